"""Numbers on a command line: what is not a finite number in its range ends the command before any work."""

import argparse

import pytest

from mistral_prune_lora import argument_types, mistral_optimized_kd_lora
from mistral_prune_lora.pruning import layeronly_drop

TRAIN, PRUNE = mistral_optimized_kd_lora, layeronly_drop


@pytest.mark.parametrize(
    ("kind", "taken", "refused"),
    [
        ("positive", ["1", "4096"], ["0", "-1", "1.5", "nan", ""]),
        ("not_negative", ["0", "7"], ["-1", "0.0", "inf"]),
        ("seed", ["0", str(2**63 - 1)], ["-1", str(2**63), "1e3"]),
        ("positive_number", ["1e-9", "32", "0.5"], ["0", "-1", "nan", "inf", "-inf", "1e400", "1e-400", "x"]),
        ("share", ["0", "1", "0.25"], ["-0.01", "1.01", "nan", "inf", "half"]),
        ("dropout", ["0", "0.999"], ["1", "-0.1", "nan"]),
        ("learning_rate", ["1e-8", "1"], ["0", "1e30", "1.01", "-1e-4", "nan", "inf"]),
        ("temperature", ["0.01", "2", "100"], ["0", "1e-30", "101", "-2", "nan", "inf"]),
    ],
)
def test_each_kind_takes_its_range_and_nothing_else(kind, taken, refused):
    read = getattr(argument_types, kind)
    assert [read(text) for text in taken] == [
        float(text) if "." in text or "e" in text else int(text) for text in taken
    ]
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match=r".+"):
            read(text)


@pytest.mark.parametrize(
    ("command", "flag", "value", "told"),
    [
        (TRAIN, "--learning_rate", "nan", "nan is not a finite number"),
        (TRAIN, "--lr", "1e30", "1e30 is more than 1"),
        (TRAIN, "--temperature", "0", "0 is less than 0.01"),
        (TRAIN, "--kd_T", "inf", "inf is not a finite number"),
        (TRAIN, "--kd_alpha", "1.5", "1.5 is more than 1"),
        (TRAIN, "--epochs", "0", "0 is not above 0"),
        (TRAIN, "--warmup_ratio", "-0.1", "-0.1 is less than 0"),
        (TRAIN, "--alpha", "nan", "nan is not a finite number"),
        (TRAIN, "--dropout", "1", "1 would drop everything"),
        (TRAIN, "--weight_decay", "inf", "inf is not a finite number"),
        (TRAIN, "--max_grad_norm", "0", "0 is not above 0"),
        (TRAIN, "--seed", str(2**64), f"{2**64} is more than {2**63 - 1}"),
        (PRUNE, "--drop_frac", "nan", "nan is not a finite number"),
        (PRUNE, "--split_ratio", "2", "2 is more than 1"),
    ],
)
def test_a_number_out_of_range_ends_the_command(command, flag, value, told, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main([f"{flag}={value}"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: argument {flag}: {told}\n")
