import gc
import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

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


MODELS = "from transformers import AutoModelForCausalLM, MistralForCausalLM"
QUICK = f"""
from mistral_prune_lora.quick_imports import quick_imports
with quick_imports():
    {MODELS}
"""
READ = """
import sys
read = []
def listen(event, args):
    if event == "open" and str(args[0]).endswith("/transformers/models/bert/modeling_bert.py"):
        read.append(args[0])
sys.addaudithook(listen)
"""
TELL = """
import json, transformers
names = {name: transformers.models._class_to_module[name] for name in sorted(transformers.models._class_to_module)}
print(json.dumps([len(read), "scipy.optimize" in sys.modules, names]))
"""


@pytest.fixture(scope="module")
def quick_and_plain():
    """How often a model's source was read, whether scipy was imported, where each class is: quickly, and plainly."""
    commands = [[sys.executable, "-c", READ + imports + TELL] for imports in (QUICK, MODELS)]
    runs = [subprocess.run(command, capture_output=True, check=True) for command in commands]
    return [json.loads(run.stdout.splitlines()[-1]) for run in runs]


def test_the_sources_of_transformers_models_are_read_once_and_it_offers_the_same(quick_and_plain):
    (once, _, quick), (twice, _, plain) = quick_and_plain
    assert (once, twice) == (1, 2)
    assert len(plain) > 3000 and quick == plain


def test_scipy_is_not_imported_with_transformers_and_can_be_afterwards(quick_and_plain):
    assert [scipy for _, scipy, _ in quick_and_plain] == [False, True]
    later = "from scipy.special import stdtrit\nprint(stdtrit(3, 0.9))"
    subprocess.run([sys.executable, "-c", QUICK + later], check=True, capture_output=True)


def test_scipy_stays_where_it_was_imported_before(monkeypatch):
    import scipy

    with quick_imports():
        assert sys.modules["scipy"] is scipy
    assert sys.modules["scipy"] is scipy


def test_an_import_that_fails_leaves_the_importing_as_it_was(monkeypatch):
    monkeypatch.delitem(sys.modules, "scipy", raising=False)
    before = list(sys.meta_path)
    with pytest.raises(ImportError), quick_imports():
        import mistral_prune_lora.none  # noqa: F401
    assert "scipy" not in sys.modules and sys.meta_path == before


def test_transformers_looks_up_as_by_itself_afterwards():
    told = (
        "import transformers.utils.import_utils as u\nassert hasattr(u.create_import_structure_from_path, 'cache_info')"
    )
    subprocess.run([sys.executable, "-c", QUICK + told], check=True, capture_output=True)


def test_another_transformers_imports_as_it_does_by_itself(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.utils.import_utils", SimpleNamespace())
    monkeypatch.delitem(sys.modules, "transformers.models", raising=False)
    with quick_imports():
        assert importlib.util.find_spec("transformers.models")
