"""Which files are spoilt, and how: drawn by hypothesis, the same for the same seed and number."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from attack.byte_edits import CONTENTS, NODES
from attack.edits import Edit, Spoiling
from attack.formats import Format, Kind, kind_of
from attack.json_edits import VALUES
from attack.row_edits import LINES, TABLES
from attack.safetensors_edits import NUMBERS
from attack.yaml_edits import SNIPPETS

_SHARE = st.integers(0, 9999).map(lambda n: n / 10_000)
_SEED = st.integers(0, 2**32 - 1)
_BY = st.sampled_from([-1, 1, 2, 7, -8, 8, 4096, 2**31, 2**63])
_TEXT = st.sampled_from(["\0", "\xff", ",", '"', "{", "}", "\n", "[" * 50, "\x1b[2J", "0", "-", "e9999", "\\u0000"])
_DTYPE = st.sampled_from(["F16", "BF16", "F32", "F64", "I8", "BOOL", "F8_E4M3", "F4", "", "bf16", "U64"])
_TENSOR = st.sampled_from(
    [
        "x",
        "",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.99.mlp.up_proj.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "../../x",
        "n" * 2000,
        "\x1b[2J",
    ]
)


def _edit(kind: str, *arguments: st.SearchStrategy) -> st.SearchStrategy[Edit]:
    return st.tuples(*arguments).map(lambda given: Edit(kind, given))


_BYTES = {
    "cut": (_SHARE,),
    "beheaded": (st.integers(1, 64),),
    "bit flipped": (_SHARE, st.integers(0, 7)),
    "overwritten with noise": (_SHARE, st.integers(1, 64), _SEED),
    "zeroed": (_SHARE, st.sampled_from([1, 8, 64, 4096])),
    "inserted": (_SHARE, _TEXT),
    "blocks exchanged": (_SHARE, _SHARE, st.sampled_from([1, 8, 64, 512])),
    "content replaced by": (st.sampled_from(sorted(CONTENTS)),),
    "twice in a row": (),
    "NUL bytes behind": (st.sampled_from([1, 64, 4096]),),
    "byte order mark": (),
    "Latin-1": (),
    "UTF-16": (),
}
_MEANINGS = {
    "value is": (_SHARE, st.sampled_from(sorted(VALUES))),
    "key struck out": (_SHARE,),
    "key misspelt": (_SHARE,),
    "key twice, then": (_SHARE, st.sampled_from(sorted(VALUES))),
    "all keys twice": (),
    "values exchanged": (_SHARE, _SHARE),
    "number shifted": (_SHARE, _BY),
    "value quoted": (_SHARE,),
    "value wrapped": (_SHARE, st.sampled_from(["list", "object", "300 lists"])),
    "list changed": (_SHARE, st.sampled_from(["reversed", "longer", "shorter", "twice"])),
    "unknown key": (st.sampled_from(sorted(VALUES)),),
}
_TENSORS = {
    "tensors exchanged": (_SHARE, _SHARE),
    "tensor of type": (_SHARE, _DTYPE),
    "tensor's shape": (_SHARE, st.sampled_from(["reversed", "flat", "huge", "none"])),
    "tensor moved": (_SHARE, _BY),
    "tensor left out": (_SHARE,),
    "tensor added": (_TENSOR,),
    "tensor renamed": (_SHARE, st.sampled_from([".x", "s", ".default", " "])),
    "number is": (_SHARE, _SHARE, st.sampled_from(sorted(NUMBERS))),
    "length of the header": (_BY,),
}
_ROWS = {
    "line is": (_SHARE, st.sampled_from(sorted(LINES))),
    "line left out": (_SHARE,),
    "lines turned round": (_SHARE,),
    "column renamed": (),
    "line ends": (st.sampled_from(["\r\n", "\r", "\u2028", "\x0b"]),),
}
_PACKED = {
    **{f"unpacked: {name}": arguments for name, arguments in {**_BYTES, **_ROWS}.items()},
    "not packed": (),
    "a bomb": (st.sampled_from([80, 1100]),),
}
_GGUF = {
    "header's number shifted": (_SHARE, _BY),
    "header's number of type": (_SHARE, st.integers(0, 15)),
    "header's key misspelt": (_SHARE,),
    "GGUF tensor renamed": (_SHARE, st.sampled_from(["output.weight", "blk.1.ffn_up.weight", "blk.7.attn_q.weight"])),
    "GGUF tensors exchanged": (_SHARE, _SHARE),
}
# Text for Snakemake, which reads a configuration before this project's code does.
_NO_TEXT = ("Latin-1", "UTF-16", "overwritten with noise")
_CHARACTERS = {name: given for name, given in _BYTES.items() if name not in _NO_TEXT} | {
    "bit flipped": (_SHARE, st.integers(0, 6)),
    "inserted": (_SHARE, _TEXT.filter(str.isascii)),
    "content replaced by": (st.sampled_from(sorted(name for name, content in CONTENTS.items() if content.isascii())),),
}
_KINDS: dict[Format, tuple[dict, ...]] = {
    Format.JSON: (_BYTES, _MEANINGS, _MEANINGS),
    Format.SAFETENSORS: (_BYTES, _TENSORS, _TENSORS, {f"header: {name}": given for name, given in _MEANINGS.items()}),
    Format.LINES: (_BYTES, _ROWS),
    Format.PACKED: (_BYTES, _PACKED),
    Format.TABLE: (_BYTES, {"a sound table of": (st.sampled_from(sorted(TABLES)),)}),
    Format.BINARY: (_BYTES,),
    Format.GGUF: (_BYTES, _GGUF),
    Format.YAML: (
        _CHARACTERS,
        {f"configuration: {name}": given for name, given in _MEANINGS.items()},
        {"YAML behind": (st.sampled_from(sorted(SNIPPETS)),), "YAML before": (st.sampled_from(sorted(SNIPPETS)),)},
    ),
}


def spoilings(form: Format, *, nodes: bool) -> st.SearchStrategy[Spoiling]:
    """What may be done to a file of some format: one edit or a few, now and then another node in its place."""
    edits = st.one_of([st.one_of([_edit(kind, *given) for kind, given in kinds.items()]) for kinds in _KINDS[form]])
    few = st.lists(edits, min_size=2, max_size=3).map(tuple)
    ways = [edits.map(lambda edit: (edit,)), edits.map(lambda edit: (edit,)), few]
    spoiling = st.one_of(ways).map(lambda edits: Spoiling(None, edits))
    replaced = st.sampled_from(sorted(NODES)).map(Spoiling)
    # Seven nodes stand beside endlessly many edits.
    return st.one_of([*[spoiling] * 6, replaced]) if nodes else spoiling


@dataclass(frozen=True)
class FileCase:
    """One hostile file.

    Attributes:
        name: for --only.
        kind: of what the file is.
        scene: the name of the scene that reads it.
        file: its path in the project's folder.
        spoiling: what is done to it.
    """

    name: str
    kind: Kind
    scene: str
    file: str
    spoiling: Spoiling

    def __str__(self) -> str:
        return f"{self.name}: {self.scene}, {self.file}: {self.spoiling}"


@dataclass(frozen=True)
class Target:
    """A file that a scene reads: the scene's name, its path, its bytes, whether what is no file may take its place."""

    scene: str
    file: str
    valid: bytes = field(repr=False)
    nodes: bool


def file_cases(targets: list[Target], count: int, seed_: int) -> list[FileCase]:
    """Cases over some files, an equal number for every kind of file, at least `count` of them.

    Each case spoils something: edits that find nothing to change in a file are drawn again.

    Args:
        targets: the files.
        count: how many cases.
        seed_: the same gives the same cases.
    """
    kinds = sorted({kind_of(target.file) for target in targets}, key=list(Kind).index)
    each = -(-count // len(kinds))
    cases = []
    for kind in kinds:
        own = [target for target in targets if kind_of(target.file) is kind]
        for number, (target, spoiling) in enumerate(draw(_of_targets(kind, own), each, seed_ + list(Kind).index(kind))):
            name = f"{kind.name.lower()}-{number:03d}"
            cases.append(FileCase(name, kind, target.scene, target.file, spoiling))
    return cases


def _of_targets(kind: Kind, own: list[Target]) -> st.SearchStrategy[tuple[Target, Spoiling]]:
    ways = {nodes: spoilings(kind.value.form, nodes=nodes) for nodes in {target.nodes for target in own}}
    drawn = st.sampled_from(own).flatmap(lambda target: st.tuples(st.just(target), ways[target.nodes]))
    return drawn.filter(lambda case: case[1].spoils(case[0].valid))


def draw(strategy: st.SearchStrategy, count: int, seed_: int) -> list:
    """So many examples; hypothesis draws no two alike."""
    found: list = []

    @seed(seed_)
    @settings(
        max_examples=count,
        database=None,
        phases=(Phase.generate,),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(example: object) -> None:
        found.append(example)

    collect()
    return found
