"""Boundary activations on disk, and memory: what does not fit is said before it fails, with what would."""

import errno
import json
import os
import re
import shutil
from collections import namedtuple

import pytest
import torch
from cut_model import cut, random_windows, save_dense
from evaluation_jobs import segment_job
from evaluation_project import evaluate, write_project
from safetensors.torch import load_file, save_file

from mistral_prune_lora.errors import CheckpointError, DataError, NumberError, PipelineError
from mistral_prune_lora.evaluation.stages import boundary_bytes, evaluate_stages
from mistral_prune_lora.evaluation.subject import Subject
from mistral_prune_lora.layout.partition import STAGES, Layout
from mistral_prune_lora.sizes import parse_size, size_text
from mistral_prune_lora.storage.activations import LESS_SPACE, ActivationReader, ActivationWriter, open_finished
from mistral_prune_lora.storage.journal import Journal, open_held
from mistral_prune_lora.storage.safetensors_file import read_header
from mistral_prune_lora.storage.space import require_space
from mistral_prune_lora.streaming.compute import Compute

SHAPE, RUN = (5, 4, 8), {"ids_sha256": "0" * 64}
Usage = namedtuple("Usage", "total used free")


def batch(number: int, count: int = 2) -> torch.Tensor:
    return torch.full((count, 4, 8), float(number), dtype=torch.bfloat16)


def writer(path, run=RUN) -> ActivationWriter:
    return ActivationWriter(path, SHAPE, torch.bfloat16, 2, run)


def test_a_finished_file_is_plain_safetensors(tmp_path):
    with writer(tmp_path / "h.safetensors") as out:
        for number, count in ((1, 2), (0, 2), (2, 1)):
            out.write(number, batch(number, count))
        assert not (tmp_path / "h.safetensors").exists(), "nothing stands there before all of it does"
        out.finish()
    expected = torch.cat([batch(0), batch(1), batch(2, 1)])
    assert torch.equal(load_file(tmp_path / "h.safetensors")["hidden_states"], expected)
    reader = ActivationReader(tmp_path / "h.safetensors")
    assert (reader.shape, reader.dtype, reader.run) == (SHAPE, torch.bfloat16, RUN)
    assert torch.equal(reader.read(1, 4), expected[1:4])
    assert [p.name for p in tmp_path.iterdir()] == ["h.safetensors"]


def finished(path, dtype=torch.bfloat16):
    """A file of five random windows; returns them."""
    hidden = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    with ActivationWriter(path, SHAPE, dtype, 2, RUN) as out:
        for number in range(3):
            out.write(number, hidden[2 * number : 2 * number + 2])
        out.finish()
    return hidden


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_window_that_is_not_what_was_written_is_never_given_out(tmp_path, dtype):
    """Whoever reads: by the batches it was written in, or window by window, or all at once."""
    path = tmp_path / "h.safetensors"
    hidden = finished(path, dtype)
    content, start = bytearray(path.read_bytes()), read_header(path)["hidden_states"].start
    content[start + 3 * 4 * 8 * dtype.itemsize + 11] ^= 1  # the lowest bit of a byte of window 3
    path.write_bytes(content)
    reader = ActivationReader(path)
    for window in (0, 1, 2, 4):
        assert torch.equal(reader.read(window, window + 1), hidden[window : window + 1])
    for first, last in ((3, 4), (2, 5), (0, 5)):
        with pytest.raises(
            DataError, match=r"window 3 is not the one that was written \(in .*h\.safetensors\)\. Delete it"
        ):
            reader.read(first, last)
    for first, last in ((0, 6), (-1, 2), (5, 6), (2, 2)):
        with pytest.raises(ValueError, match="there are 5 windows"):
            reader.read(first, last)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read: No such file or directory"):
        reader.read(0, 1)


def test_any_changed_byte_is_noticed(tmp_path):
    """Of windows, checksums and header alike: no byte of a file can change and the file still be believed."""
    path = tmp_path / "h.safetensors"
    finished(path)
    whole, believed = path.read_bytes(), []
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(content)
        try:
            reader = ActivationReader(path)
            reader.read(0, 5)
        except (CheckpointError, DataError):
            continue
        assert (reader.run, reader.shape, reader.dtype) == (RUN, SHAPE, torch.bfloat16)
        believed.append(place)
    # It says nothing of the content, and the library asks for it.
    free = whole.index(b'"format":"pt"')
    assert set(believed) <= set(range(free, free + len('"format":"pt"')))


def test_a_file_without_checksums_is_refused(tmp_path):
    """As former versions wrote them."""
    metadata = {"format": "pt", "run": json.dumps(RUN)}
    save_file({"hidden_states": batch(1, 5)}, tmp_path / "h.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=r"has no checksums of its windows .*Delete it and run the same again"):
        ActivationReader(tmp_path / "h.safetensors")


def test_states_that_are_none_are_not_written(tmp_path):
    hidden = batch(1)
    hidden[1, 2, 3] = float("nan")
    with writer(tmp_path / "h.safetensors") as out:
        out.write(0, batch(0))
        with pytest.raises(NumberError, match="the hidden states of window 3 hold NaN or infinity"):
            out.write(1, hidden)
    with writer(tmp_path / "h.safetensors") as out:
        assert out.done == {0}


@pytest.mark.parametrize(
    "entry",
    [
        {"batch": 3, "crc32": [0, 0]},
        {"batch": -1, "crc32": [0, 0]},
        {"batch": True, "crc32": [0, 0]},
        {"batch": 1.0, "crc32": [0, 0]},
        {"batch": "1", "crc32": [0, 0]},
        {"batch": 1},
        {"batch": 1, "crc32": 7},
        {"batch": 0, "crc32": []},
        {"batch": 10**30, "crc32": [0, 0]},
        {},
    ],
    ids=str,
)
def test_a_journal_that_names_batches_there_are_not_is_not_believed(tmp_path, capsys, entry):
    with writer(tmp_path / "h.safetensors") as out:
        out.write(0, batch(7))
        out._journal.append(entry)
    with writer(tmp_path / "h.safetensors") as out:
        assert out.done == {0}
        assert "an entry is not what was written" in capsys.readouterr().err
        out.write(1, batch(8))
        out.write(2, batch(9, 1))
        out.finish()
    expected = torch.cat([batch(7), batch(8), batch(9, 1)])
    assert torch.equal(ActivationReader(tmp_path / "h.safetensors").read(0, 5), expected)


def test_the_journal_of_a_run_that_was_killed_when_its_file_was_in_place_goes_with_the_next_look(tmp_path, monkeypatch):
    path = tmp_path / "h.safetensors"
    with monkeypatch.context() as killed:
        killed.setattr(Journal, "remove", lambda journal: None)
        finished(path)
    journal = tmp_path / ".h.safetensors.journal"
    assert journal.exists() and not open_finished(path, RUN | {"another": 1}) and journal.exists()
    held = open_held(journal, "held")  # somebody is at it, and has only just put the file in its place
    assert open_finished(path, RUN) and journal.exists()
    os.close(held)
    assert open_finished(path, RUN) and [p.name for p in tmp_path.iterdir()] == ["h.safetensors"]
    journal.mkdir()
    assert open_finished(path, RUN) and journal.is_dir()


def test_a_batch_named_twice_counts_once(tmp_path):
    with writer(tmp_path / "h.safetensors") as out:
        out.write(0, batch(7))
        out._journal.append(out._journal.entries[0])
        with pytest.raises(ValueError, match="2 batches are missing"):
            out.finish()
    with writer(tmp_path / "h.safetensors") as out:
        assert out.done == {0}


def test_other_batches_or_another_dtype_start_anew(tmp_path):
    with writer(tmp_path / "h.safetensors") as out:
        out.write(0, batch(7))
    for dtype, size in ((torch.float16, 2), (torch.bfloat16, 3)):
        with ActivationWriter(tmp_path / "h.safetensors", SHAPE, dtype, size, RUN) as out:
            assert out.done == set()


def test_another_run_starts_anew(tmp_path):
    with writer(tmp_path / "h.safetensors") as out:
        out.write(0, batch(7))
    with writer(tmp_path / "h.safetensors") as out:
        assert out.done == {0}
    with writer(tmp_path / "h.safetensors", {"ids_sha256": "1" * 64}) as out:
        assert out.done == set()


def test_two_writers_do_not_meet(tmp_path):
    with (
        writer(tmp_path / "h.safetensors"),
        pytest.raises(PipelineError, match="another process is computing this right now"),
    ):
        writer(tmp_path / "h.safetensors")
    writer(tmp_path / "h.safetensors").close()


def test_a_full_disk_is_noticed_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 100))
    with pytest.raises(PipelineError, match=r"320B are needed and 100B are free"):
        writer(tmp_path / "h.safetensors")
    with pytest.raises(PipelineError, match="Free space, take fewer windows"):
        require_space({tmp_path / "not/yet/there": 101}, mend=LESS_SPACE)
    require_space({tmp_path / "not/yet/there": 100})
    monkeypatch.undo()
    writer(tmp_path / "h.safetensors").close()  # the refused one holds nothing


def test_a_disk_that_fills_up_keeps_what_is_finished(tmp_path, monkeypatch):
    with writer(tmp_path / "h.safetensors") as out:
        out.write(0, batch(0))

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(PipelineError, match="cannot be written: No space left on device"):
            out.write(1, batch(1))
    monkeypatch.undo()
    with writer(tmp_path / "h.safetensors") as out:
        assert out.done == {0}


def test_what_is_no_file_of_activations_is_refused(tmp_path):
    random_windows(2, 4).save(tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="holds no boundary activations"):
        ActivationReader(tmp_path / "w.safetensors")
    for metadata in ({}, {"run": "{"}, {"run": "[]"}, {"run": "{}", "run_crc32": "00000000"}):
        tensors = {"hidden_states": batch(1, 5), "crc32": torch.zeros(5, dtype=torch.uint32)}
        save_file(tensors, tmp_path / "h.safetensors", metadata=metadata)
        with pytest.raises(CheckpointError, match="does not say what was run"):
            ActivationReader(tmp_path / "h.safetensors")


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PipelineError, match="cannot be opened"):
        writer(tmp_path / "file/h.safetensors")
    (tmp_path / "taken").mkdir()
    with writer(tmp_path / "taken") as out:
        for number, count in ((0, 2), (1, 2), (2, 1)):
            out.write(number, batch(number, count))
        with pytest.raises(PipelineError, match="activations cannot be written: Is a directory"):
            out.finish()


@pytest.fixture
def parts(tmp_path):
    dense = save_dense(tmp_path / "dense")
    return cut(dense, Layout(8, (3, 4), (5, 6)), tmp_path)


def test_a_segment_of_other_windows_is_refused(tmp_path, parts):
    a, bundles = parts
    settings = {"model_dir": a, "dtype": "fp32", "device": "cpu", "batch_size": 2}
    for seed in (1, 2):
        random_windows(3, 16, seed=seed).save(tmp_path / f"{seed}.safetensors")
    first, second = (tmp_path / f"{seed}.safetensors" for seed in (1, 2))
    kept = tmp_path / "a.safetensors"
    segment_job(weights_dir=a, layers=[0, 1, 2], windows=first, source=None, output=kept, **settings)
    goes_on = {"weights_dir": bundles["B"], "layers": [3, 4], "source": kept, "output": tmp_path / "b.safetensors"}
    with pytest.raises(DataError, match="was made with another ids_sha256"):
        segment_job(windows=second, **goes_on, **settings)
    with pytest.raises(DataError, match="was made with another dtype"):
        segment_job(windows=first, **goes_on, **{**settings, "dtype": "bf16"})
    segment_job(windows=first, **goes_on, **settings)
    assert ActivationReader(tmp_path / "b.safetensors").run["layers"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("stages", "files"), [(["A"], 0), (["FULL"], 0), (["A", "AB"], 1), (STAGES, 2)])
def test_the_estimate_is_what_is_written(tmp_path, parts, stages, files):
    windows, compute = random_windows(4, 16), Compute(torch.device("cpu"), torch.float32)
    subject = Subject.open(*parts)
    list(evaluate_stages(subject, stages, windows, compute, work_dir=tmp_path / "work"))
    written = list((tmp_path / "work").glob("*.safetensors"))
    assert len(written) == files
    estimate = boundary_bytes(subject, stages, windows, compute)
    assert estimate == files * 4 * 16 * 64 * 4
    assert sum(ActivationReader(file).read(0, 4).nbytes for file in written) == estimate


def test_a_segment_of_fewer_windows_than_it_says_is_refused(tmp_path, parts):
    """Else fewer windows would be scored, and their mean be taken for that of all."""
    a, bundles = parts
    settings = {"model_dir": a, "dtype": "bf16", "device": "cpu", "windows": tmp_path / "w.safetensors"}
    random_windows(3, 16).save(tmp_path / "w.safetensors")
    kept = tmp_path / "a.safetensors"
    segment_job(weights_dir=a, layers=[0, 1, 2], source=None, output=kept, **settings)
    reader = ActivationReader(kept)
    for shape, dtype in (((2, 16, 64), torch.bfloat16), ((3, 16, 32), torch.bfloat16), ((3, 16, 64), torch.float16)):
        with ActivationWriter(tmp_path / "b.safetensors", shape, dtype, 8, reader.run) as out:
            out.write(0, torch.zeros(shape, dtype=dtype))
            out.finish()
        with pytest.raises(DataError, match="was made with another shape"):
            segment_job(
                weights_dir=bundles["B"], layers=[3, 4], source=tmp_path / "b.safetensors", output=kept, **settings
            )


def test_the_command_says_what_it_needs_before_it_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_project(tmp_path)
    merged = [f"merged_models_mistral_7b/{part}_merged" for part in "ABC"]
    arguments = ["--model_path", *merged, "--text_file", "eval_corpus.txt", "--seqlen", "32", "--nsamples", "16"]
    done = evaluate(tmp_path, *arguments)
    assert done.code == 0 and "  Boundary activations: 0.1 MB at most, in " in done.out, done.err
    assert done.out.index("Boundary activations") < done.out.index("[A] Evaluating")
    refused = evaluate(tmp_path, *arguments, "--max_memory", "60MB")
    assert refused.code == 1 and "do not fit into 60MB (in --max_memory)" in refused.err
    needed = re.search(r"Allow ([\d.]+[KMG]?B) or more", refused.err)[1]
    enough = evaluate(tmp_path, *arguments, "--max_memory", needed)
    assert enough.code == 0, enough.err
    assert enough.out.split("Summary")[1] == done.out.split("Summary")[1]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 1000))
    full = evaluate(tmp_path, *arguments)
    assert full.code == 1 and "KB are needed and" in full.err and "Evaluating" not in full.out


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0B"), (999, "999B"), (1000, "1KB"), (7_062_001, "7.07MB"), (5 * 10**9, "5GB")]
)
def test_sizes_are_read_and_written(nbytes, text):
    assert size_text(nbytes) == text and nbytes <= parse_size(text) <= nbytes * 1.01 + 1
    assert parse_size("5 gb") == parse_size("5G") == 5 * 10**9 and parse_size("1.5MB") == 1_500_000
    for wrong in ("", "GB", "5PB", "-1", "5 5"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(wrong)
