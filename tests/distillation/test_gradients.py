"""Gradients of every LoRA parameter against stock transformers and PEFT with whole logits, in float64.

The oracle's student has no PassLayers: its layers are those that are active, in a ModuleList of their own, and each
document is run alone. Ours is given the frozen prefix from a file or not, documents beside each other or not.
"""

from dataclasses import replace

import pytest
import torch
from cut_model import cut, random_windows, save_dense
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from mistral_prune_lora.distillation.adapted import AdaptedStudent
from mistral_prune_lora.distillation.batches import Shelf
from mistral_prune_lora.distillation.curve import COLUMNS, HELD_OUT_COLUMNS, Table
from mistral_prune_lora.distillation.loop import Loop, Watch
from mistral_prune_lora.distillation.prefix import open_prefix, prefix_states
from mistral_prune_lora.distillation.ranks import Ranks
from mistral_prune_lora.distillation.settings import (
    HiddenLoss,
    LoraSettings,
    LossSettings,
    OptimiserSettings,
    TrainingSettings,
)
from mistral_prune_lora.distillation.student import Student
from mistral_prune_lora.distillation.teacher import Teacher, TeacherFiles
from mistral_prune_lora.distillation.teacher_states import teacher_states
from mistral_prune_lora.layout.partition import Layout
from mistral_prune_lora.storage import dtypes
from mistral_prune_lora.streaming import record as run_record
from mistral_prune_lora.streaming.compute import Compute
from mistral_prune_lora.text.windows import Windows, ids_digest, scored_digest

LAYOUT = Layout(8, (3, 4), (5, 6))
ACTIVE = {"A": (0, 1, 2, 7), "B": (0, 1, 2, 3, 4, 7), "C": tuple(range(8)), "AB": (0, 1, 2, 3, 4, 7)}
ACTIVE["FULL"] = ACTIVE["C"]
ADAPTED = {"A": (0, 1, 2, 7), "B": (3, 4), "C": (5, 6), "AB": (0, 1, 2, 3, 4, 7)}
SEQLEN = 16
F64 = Compute(torch.device("cpu"), torch.float64, 2)
# Documents of each window by their lengths; and how many tokens at the end of each are scored (0: padding).
ROWS = (((16, 15),), ((5, 2), (9, 4), (2, 0)), ((6, 0), (10, 3)), ((9, 8), (7, 6)))


@pytest.fixture(autouse=True)
def float64_may_be_stored(monkeypatch):
    monkeypatch.setitem(dtypes.COMPUTE_NAMES, torch.float64, "fp64")
    monkeypatch.setattr(run_record, "COMPUTE_NAMES", dtypes.COMPUTE_NAMES)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    dense = save_dense(folder / "dense", dtype=torch.float32)
    return dense, *cut(dense, LAYOUT, folder, torch.float32)


def plain_windows() -> Windows:
    return random_windows(len(ROWS), SEQLEN)


def documents() -> Windows:
    windows = plain_windows()
    positions = torch.stack([torch.cat([torch.arange(n, dtype=torch.int32) for n, _ in row]) for row in ROWS])
    scored = torch.stack([torch.cat([torch.arange(n) >= n - told for n, told in row]) for row in ROWS])
    told = {"ids_sha256": ids_digest(windows.ids, positions), "scored_sha256": scored_digest(scored)}
    return Windows(windows.ids, replace(windows.identity, **told), positions, scored)


def settings_of(trained, **changes) -> TrainingSettings:
    loss = changes.pop("loss", LossSettings(0.7, 2.0))
    lora = LoraSettings(rank=2, target_modules=("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"))
    return TrainingSettings(lora, loss, OptimiserSettings(steps=1, batch_size=2, gradient_accumulation=2), **changes)


def student_of(parts, trained) -> Student:
    _, a, bundles = parts
    return Student(
        a, {"A": (), "B": (bundles["B"],), "AB": (bundles["B"],), "C": (bundles["B"], bundles["C"])}[trained]
    )


def shake(model, names) -> None:
    """Give lora_B numbers: where it starts, at zero, errors of lora_A would be hidden."""
    parameters = dict(model.named_parameters())
    for number, name in enumerate(names):
        draw = torch.Generator().manual_seed(number)
        parameters[name].data = torch.randn(parameters[name].shape, generator=draw, dtype=torch.float64) / 5


def oracle(parts, trained, windows, settings, stage=None) -> dict[str, torch.Tensor]:
    """Gradients by the names of original layers, of the loss's mean over the scored tokens of all windows."""
    dense = AutoModelForCausalLM.from_pretrained(parts[0], dtype=torch.float64)
    model = AutoModelForCausalLM.from_pretrained(parts[0], dtype=torch.float64)
    active, layers = ACTIVE[stage or trained], list(settings.adapt_layers or ADAPTED[trained])
    model.model.layers = nn.ModuleList(model.model.layers[i] for i in active)
    model.config.num_hidden_layers = len(active)
    lora = settings.lora
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules),
        layers_to_transform=[active.index(i) for i in layers],
    )  # fmt: skip
    model = get_peft_model(model, config)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    shake(model, names)
    total, loss = 0, torch.zeros((), dtype=torch.float64)
    for row, window in enumerate(windows.ids.long()):
        lengths = [n for n, _ in ROWS[row]] if windows.scored is not None else [SEQLEN]
        marks = windows.scored[row] if windows.scored is not None else torch.arange(SEQLEN) > 0
        for ids, scored in zip(window.split(lengths), marks.split(lengths), strict=True):
            want = scored[1:]
            out = model(ids[None], output_hidden_states=True, use_cache=False)
            with torch.no_grad():
                told = dense(ids[None], output_hidden_states=True, use_cache=False)
            loss = loss + formula(out, told, ids[1:], want, settings.loss, active)
            total += int(want.sum())
    # Divided by afterwards, as ours: transformers' norm is float32 inside, and rounds another number otherwise.
    loss.backward()
    parameters = dict(model.named_parameters())
    assert all(parameters[name].dtype == torch.float64 for name in names)
    return {original(name, active): parameters[name].grad / total for name in names}


def formula(out, told, targets, want, loss, active):
    t = loss.temperature
    z, q = out.logits[0, :-1][want], told.logits[0, :-1][want]
    kl = functional.kl_div((z / t).log_softmax(-1), (q / t).log_softmax(-1), log_target=True, reduction="sum")
    ce = functional.cross_entropy(z, targets[want], reduction="sum")
    value = loss.kd_alpha * t * t * kl + (1 - loss.kd_alpha) * ce
    if loss.hidden:
        # hidden_states[i + 1] leaves layer i, unless that is the last: then the norm is in it.
        ours = out.hidden_states[active.index(loss.hidden.student_layer) + 1][0, :-1][want]
        theirs = told.hidden_states[loss.hidden.teacher_layer + 1][0, :-1][want]
        value = value + loss.hidden.weight * (1 - functional.cosine_similarity(ours, theirs, dim=-1)).sum()
    return value


def original(name: str, active) -> str:
    head, _, rest = name.partition(".layers.")
    number, _, tail = rest.partition(".")
    return f"{head}.layers.{active[int(number)]}.{tail}"


def ours(parts, trained, windows, settings, folder, *, prefix: bool, states: bool = True) -> dict[str, torch.Tensor]:
    dense, student = parts[0], student_of(parts, "C" if "FULL" in settings.stages else trained)
    layers, hidden = student.adapted_layers(trained, settings.adapt_layers, settings.stages), settings.loss.hidden
    files = [None, None]
    if states:
        teacher_states(dense, windows, folder / "states", compute=F64)
        files[0] = folder / "states"
    if states and hidden:
        teacher_states(dense, windows, folder / "layer", compute=F64, layer=hidden.teacher_layer)
        files[1] = folder / "layer"
    watched = hidden.teacher_layer if hidden else None
    teacher = Teacher(TeacherFiles(dense, *files), windows, torch.float64, "cpu", watched)
    shelf = Shelf(windows, F64.device, taught=teacher.states, taught_layer=teacher.layer_states)
    if prefix:
        prefix_states(student, min(layers), windows, folder / "prefix", compute=F64)
        reader = open_prefix(folder / "prefix", student, min(layers), windows, torch.float64, F64.device)
        shelf = replace(shelf, entering=reader)
    adapted = AdaptedStudent(student, layers, settings, F64, with_prefix=not prefix)
    names = [name for name, p in adapted.model.named_parameters() if p.requires_grad]
    for parameter in adapted.trained:
        parameter.data = parameter.data.double()
    shake(adapted.model, names)
    loop = Loop(
        adapted, teacher, shelf, None, settings, Watch(Table(None, COLUMNS), Table(None, HELD_OUT_COLUMNS)), Ranks()
    )
    total = windows.predicted_tokens
    for batch in shelf.ahead([[0, 1], [2, 3]]):
        loop._add_gradients(batch)
    return {name: p.grad / total for name, p in adapted.model.named_parameters() if p.requires_grad}


def exact_norm(norm, hidden):
    return norm.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def assert_same(found, wanted) -> None:
    assert found.keys() == wanted.keys()
    assert any(gradient.abs().max() > 1e-4 for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-10, atol=1e-10, msg=lambda told, n=name: f"{n}: {told}"
        )


@pytest.mark.parametrize("windows", [plain_windows, documents], ids=["windows", "documents"])
@pytest.mark.parametrize(("trained", "prefix"), [("A", False), ("B", False), ("B", True), ("C", True), ("AB", False)])
def test_they_are_those_of_whole_logits(parts, tmp_path, trained, prefix, windows):
    data, settings = windows(), settings_of(trained)
    found = ours(parts, trained, data, settings, tmp_path, prefix=prefix)
    assert_same(found, oracle(parts, trained, data, settings))


def test_of_a_teacher_that_runs_along(parts, tmp_path):
    data, settings = documents(), settings_of("B")
    found = ours(parts, "B", data, settings, tmp_path, prefix=False, states=False)
    assert_same(found, oracle(parts, "B", data, settings))


@pytest.mark.parametrize("prefix", [False, True])
def test_with_some_layers_of_a_part_alone(parts, tmp_path, prefix):
    settings = settings_of("A", adapt_layers=(2, 7))
    found = ours(parts, "A", plain_windows(), settings, tmp_path, prefix=prefix)
    assert_same(found, oracle(parts, "A", plain_windows(), settings))
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in found} == {2, 7}


@pytest.mark.parametrize("states", [False, True])
def test_with_one_hidden_state_brought_close(parts, tmp_path, states):
    settings = settings_of("B", loss=LossSettings(0.5, 1.0, hidden=HiddenLoss(4, 5, 0.3)))
    found = ours(parts, "B", documents(), settings, tmp_path, prefix=True, states=states)
    assert_same(found, oracle(parts, "B", documents(), settings))


@pytest.mark.parametrize("windows", [plain_windows, documents], ids=["windows", "documents"])
def test_of_one_adapter_for_several_stages(parts, tmp_path, windows, monkeypatch):
    """Layers that stages share are run once, and what comes back is the sum of the stages' own gradients."""
    # transformers' norm is float32 inside: a sum that goes through it is rounded otherwise than its summands.
    monkeypatch.setattr(MistralRMSNorm, "forward", exact_norm)
    data, settings = windows(), settings_of("A", stages={"A": 2, "AB": 1, "FULL": 1})
    found = ours(parts, "A", data, settings, tmp_path, prefix=False)
    each = {stage: oracle(parts, "A", data, settings, stage) for stage in settings.stages}
    shares = {"A": 0.5, "AB": 0.25, "FULL": 0.25}
    wanted = {name: sum(shares[stage] * each[stage][name] for stage in each) for name in each["A"]}
    assert_same(found, wanted)


def test_with_activations_recomputed(parts, tmp_path):
    settings = settings_of("C", gradient_checkpointing=True)
    found = ours(parts, "C", documents(), settings, tmp_path, prefix=True)
    assert_same(found, oracle(parts, "C", documents(), settings))


def test_c_s_prefix_set_out_from_b_s_is_that_from_the_ids(parts, tmp_path):
    windows, of_b, of_c = plain_windows(), student_of(parts, "B"), student_of(parts, "C")
    prefix_states(of_b, 3, windows, tmp_path / "b", compute=F64)
    prefix_states(of_c, 5, windows, tmp_path / "c", compute=F64, start=tmp_path / "b")
    prefix_states(of_c, 5, windows, tmp_path / "whole", compute=F64)
    assert torch.equal(*(load_file(tmp_path / name)["hidden_states"] for name in ("c", "whole")))
