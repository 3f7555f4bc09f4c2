import gc
import sys

import pytest

from mistral_prune_lora.quick_imports import quick_imports


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.unfreeze()
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_collected_meanwhile_and_what_was_imported_is_left_out_afterwards(monkeypatch):
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with quick_imports():
        assert not gc.isenabled()
        import this  # noqa: F401
    assert gc.isenabled() and gc.get_freeze_count()


def test_where_nothing_was_imported_nothing_is_left_out():
    with quick_imports():
        import gc as known  # noqa: F401
    assert gc.isenabled() and not gc.get_freeze_count()


def test_an_import_that_fails_leaves_the_collector_on():
    with pytest.raises(ImportError), quick_imports():
        import mistral_prune_lora.none  # noqa: F401
    assert gc.isenabled()


def test_who_had_turned_the_collector_off_keeps_it_off():
    gc.disable()
    with quick_imports():
        pass
    assert not gc.isenabled()
