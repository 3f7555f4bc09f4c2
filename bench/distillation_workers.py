"""What bench/distillation.py sets beside the training command: `python distillation_workers.py NAME CASE.json ...`.

A worker prints one line of JSON. Nothing of the library is imported but by `loss_ours`: the others run in environments
where it may not be installed.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn import functional

LOSS_REPEATS = 5


def plain(case: dict, part: str, output: str) -> dict:
    """transformers and PEFT: both models in memory, whole logits, the teacher in every step, AdamW."""
    from peft import get_peft_model
    from transformers import get_cosine_schedule_with_warmup

    teacher = _load(case["dense"]).eval().requires_grad_(False)
    student = _load(case["parts"][part]["checkpoint"])
    torch.manual_seed(0)
    model = get_peft_model(student, _lora(case, part)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=case["learning_rate"], weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimiser, 0, case["steps"])
    losses = []
    for ids in _ordered_windows(case):
        with torch.no_grad():
            taught = teacher(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = _loss(logits, taught, ids[:, 1:].flatten(), **case["loss"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    model.save_pretrained(output)
    return {"losses": losses}


def trl(case: dict, part: str, output: str) -> dict:
    """TRL's GKDTrainer on the same windows, on the text's tokens alone (lmbda 0), by forward KL (beta 0)."""
    from datasets import Dataset
    from transformers import AutoTokenizer, default_data_collator
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    torch.manual_seed(0)
    ids = _windows(case)
    # The first token is nobody's prediction; the Trainer divides by the number of labels.
    labels = ids.clone()
    labels[:, 0] = -100
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    given = GKDConfig(
        output_dir=output,
        lmbda=0.0,
        beta=0.0,
        temperature=case["loss"]["temperature"],
        max_steps=case["steps"],
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        learning_rate=case["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=False,
        use_cpu=True,
        seed=0,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = GKDTrainer(
        model=_load(case["parts"][part]["checkpoint"]),
        teacher_model=_load(case["dense"]),
        args=given,
        data_collator=default_data_collator,
        train_dataset=Dataset.from_dict({name: column.tolist() for name, column in columns.items()}),
        processing_class=AutoTokenizer.from_pretrained(case["dense"]),
        peft_config=_lora(case, part),
    )
    trainer.train()
    trainer.save_model(output)
    return {"losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}


def loss_ours(case: dict) -> dict:
    """Head and loss of one window as the training command has them, with the gradient of the hidden states."""
    from mistral_prune_lora.distillation.loss import HeadLoss
    from mistral_prune_lora.distillation.settings import LossSettings

    student, student_head, teacher, teacher_head, targets = _loss_inputs(case)
    head_loss = HeadLoss(LossSettings(case["loss"]["kd_alpha"], 1.0), student_head, teacher_head)

    def once() -> tuple[torch.Tensor, torch.Tensor]:
        sums, gradient = head_loss(student, targets, teacher)
        return sums[0] / len(targets), gradient.div_(len(targets))

    return _timed_loss(once)


def loss_liger(case: dict) -> dict:
    """The same by Liger's chunked loss, uncompiled, which computes the gradient of the frozen head as well."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    student, student_head, teacher, teacher_head, targets = _loss_inputs(case)
    soft = case["loss"]["kd_alpha"]
    chunked = LigerFusedLinearJSDLoss(1 - soft, soft, beta=0.0, temperature=1.0, compiled=False)

    def once() -> tuple[torch.Tensor, torch.Tensor]:
        hidden = student.detach().requires_grad_(True)
        loss = chunked(hidden, student_head, teacher, teacher_head, targets)
        loss.backward()
        return loss, hidden.grad

    return _timed_loss(once)


def _load(checkpoint: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def _lora(case: dict, part: str):
    from peft import LoraConfig

    lora = case["lora"]
    return LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=lora["target_modules"],
        layers_to_transform=case["parts"][part]["adapted"],
        task_type="CAUSAL_LM",
    )


def _windows(case: dict) -> torch.Tensor:
    return torch.tensor(json.loads(Path(case["ids"]).read_text(encoding="utf-8")))


def _ordered_windows(case: dict) -> Iterator[torch.Tensor]:
    """Every window once before any comes again, in the command's own order, so that losses can be compared."""
    windows, order, left = _windows(case), random.Random(0), case["steps"]
    while left:
        numbers = list(range(len(windows)))
        order.shuffle(numbers)
        for number in numbers[:left]:
            yield windows[number : number + 1]
        left -= min(left, len(numbers))


def _loss(
    student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, *, kd_alpha: float, temperature: float
) -> torch.Tensor:
    """kd_alpha T^2 KL(teacher || student) + (1 - kd_alpha) cross-entropy, mean over tokens."""
    soft = functional.kl_div(
        (student / temperature).log_softmax(-1),
        (teacher / temperature).log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    return kd_alpha * temperature**2 * soft + (1 - kd_alpha) * functional.cross_entropy(student, targets)


def _loss_inputs(case: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random hidden states and heads of a window: student's, teacher's; and targets."""
    draw, shape = torch.Generator().manual_seed(0), case["geometry"]
    tokens, hidden, vocabulary = case["seqlen"] - 1, shape["hidden"], shape["vocabulary"]
    states = [torch.randn(tokens, hidden, generator=draw) for _ in range(2)]
    heads = [torch.randn(vocabulary, hidden, generator=draw) * hidden**-0.5 for _ in range(2)]
    targets = torch.randint(vocabulary, (tokens,), generator=draw)
    return states[0], heads[0], states[1], heads[1], targets


def _timed_loss(once: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> dict:
    """The median time of a call after one that warms up, what it gave, and its memory beside its inputs."""
    # The high-water mark comes down to what is resident now: the inputs were made with buffers that are gone.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _high_water()
    loss, gradient = once()
    seconds = []
    for _ in range(LOSS_REPEATS):
        began = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - began)
    taken = _high_water() - before
    return {
        "seconds": statistics.median(seconds),
        "taken": taken,
        "loss": float(loss.detach()),
        "gradient": float(gradient.norm()),
    }


def _high_water() -> int:
    """The largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


WORKERS: dict[str, Callable[..., dict]] = {f.__name__: f for f in (plain, trl, loss_ours, loss_liger)}

if __name__ == "__main__":
    name, case_file, *words = sys.argv[1:]
    print(json.dumps(WORKERS[name](json.loads(Path(case_file).read_text(encoding="utf-8")), *words)))
