"""Many adapters in one run: one frozen base in memory, and in each batch rows of many adapters side by side.

In: recipes (`TrainConfig`, `PerftConfig`) that name one base. Out: for each recipe what `perft.train.train` would have written,
as soon as it is done. An adapter's data, order, dropout, optimiser, schedule, clipping and stopping are its own, so what comes
out equals training it alone up to float32 rounding; the shared forward and backward pass is what is saved.

Every round each adapter that is training takes one optimiser step. Its micro-batches are those of Trainer; those of different
adapters are laid one below the other and go through the base together. The base's rows do not see each other and its weights
get no gradient, so one adapter's loss reaches no other adapter's parameters. One whose loss is no longer finite is let go.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, get_scheduler

from perft.base import load_base
from perft.config import PerftConfig
from perft.data import PaddingCollator
from perft.errors import PerftError
from perft.layer import AdapterTokens, MixedBatch, PerftLayer, RandomStream, RouterTrace
from perft.lora import LoraRecipe
from perft.losses import RouterHealth, router_load_balancing_loss
from perft.model import resolve_config, share_of_batch
from perft.moe import MoeBlock, find_moe_blocks
from perft.provenance import TRAINING_FILE, describe_base, read_record, write_record
from perft.recipe import TrainConfig
from perft.train import (
    CHECKPOINTS,
    LogCallback,
    check_output,
    check_packing,
    check_same_base,
    check_same_run,
    clear_output,
    count_examples,
    describe_run,
    load_data,
    load_tokenizer,
    require_train_extra,
    trainer_arguments,
    write_finished,
)

State = Literal["waiting", "training", "done", "failed"]
MicroBatch: TypeAlias = "dict[str, Tensor]"
# what the members share, because it is the base's or the forward pass's
_COMMON = ("model", "dtype", "mixed_precision", "gradient_checkpointing")
_FOLDER = "fleet-"  # of a member's checkpoints; Trainer's are called otherwise, and cannot be mixed up with them


@dataclass(kw_only=True, slots=True)
class Member:
    """One adapter of a fleet: what it is to become, and how far it is.

    Args:
        label: what the user calls it (its recipe's name).
        config: how it is trained.
        adapter: what it is.
        record: what will be in `perft_training.json`.
        state: waiting, training, done or failed.
        step: optimiser steps taken.
        total_steps: those that it will take.
        history: its log.
        reason: why it failed, or why it ended early.
    """

    label: str
    config: TrainConfig
    adapter: PerftConfig
    record: dict[str, Any]
    train_data: Any = None
    eval_data: Any = None
    state: State = "waiting"
    step: int = 0
    total_steps: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    reason: str = ""

    def last(self, name: str) -> float | None:
        """The latest logged value of `name`."""
        return next((entry[name] for entry in reversed(self.history) if name in entry), None)


def train_many(
    recipes: Sequence[tuple[str, TrainConfig, PerftConfig | LoraRecipe]],
    *,
    resume: bool = False,
    overwrite: bool = False,
    at_once: int | None = None,
    tokens_per_pass: int = 8192,
    progress: Callable[[Sequence[Member]], None] | None = None,
) -> list[Member]:
    """Trains all recipes on one base and writes each adapter when it is done.

    Args:
        recipes: label, how and what of each.
        resume: go on where an earlier run stopped: finished ones are left alone, others continue from their checkpoint.
        overwrite: start anew in output folders that hold earlier runs, which are deleted.
        at_once: how many train at the same time (default: all); the others wait for one to end.
        tokens_per_pass: padded tokens that go through the base at once; a single micro-batch may be more.
        progress: called after every round.

    Returns:
        The members, each done or failed.

    Raises:
        PerftError: recipes contradict each other, or one cannot be begun. Nothing is trained then.
    """
    require_train_extra()
    from accelerate import PartialState  # of the extra `train`

    process = PartialState()
    if process.num_processes > 1:
        raise PerftError(
            "train-many runs in one process; give each of several its own recipes, without `accelerate launch`"
        )
    if at_once is not None and at_once < 1:
        raise PerftError(f"at_once must be at least 1, got {at_once}")
    if tokens_per_pass < 1:
        raise PerftError(f"tokens_per_pass must be at least 1, got {tokens_per_pass}")
    _check_recipes(recipes)
    members = []
    for label, config, adapter in recipes:
        try:
            if isinstance(adapter, LoraRecipe):
                raise PerftError("method=lora is for `perft train`; many adapters at once are PERFT's")
            member = Member(
                label=label, config=config, adapter=copy.deepcopy(adapter), record=describe_run(config, adapter)
            )
            _check_folder(member, resume=resume, overwrite=overwrite)
        except PerftError as error:
            raise PerftError(f"{label}: {error}") from error
        members.append(member)
    common = members[0].config
    tokenizer = load_tokenizer(common.model)
    for member in members:
        if member.state == "waiting":
            try:
                member.train_data, member.eval_data = load_data(member.config, tokenizer)
            except PerftError as error:
                raise PerftError(f"{member.label}: {error}") from error
    base = load_base(common.model, common.dtype)
    identity = describe_base(common.model)
    _check_base(base)
    fleet = Fleet(base, tokenizer, common, tokens_per_pass, process.device)
    for member in members:
        member.record["base"] = identity
        if member.state == "waiting":
            try:
                check_packing(member.config, base)
                resolve_config(copy.deepcopy(member.adapter), fleet.blocks)
                if resume and (Path(member.config.output) / TRAINING_FILE).is_file():
                    check_same_base(Path(member.config.output), identity)
            except PerftError as error:
                raise PerftError(f"{member.label}: {error}") from error
    if overwrite:  # nothing is deleted before all recipes are known to be good
        for member in members:
            clear_output(Path(member.config.output))
    fleet.run(members, at_once or len(members), progress or (lambda _: None))
    return members


class Fleet:
    """A frozen base with the adapters that are training on it.

    Args:
        base: the model.
        tokenizer: of it.
        common: a recipe, for what all have in common.
        tokens_per_pass: as in `train_many`.
        device: where all of it goes.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        common: TrainConfig,
        tokens_per_pass: int,
        device: torch.device,
    ) -> None:
        self.blocks = find_moe_blocks(base)
        self._trace, self._mixed = RouterTrace(), MixedBatch()
        base.requires_grad_(False)
        self.layers = [self._wrap(base, block) for block in self.blocks]
        self.device = device
        self._base = base.to(self.device)
        self._pad_token_id = tokenizer.pad_token_id or 0
        self._tokens_per_pass = tokens_per_pass
        self._bfloat16 = common.mixed_precision == "bfloat16"
        if common.gradient_checkpointing:
            # embeddings are frozen, so the first checkpointed layer's input has no gradient: not the reentrant kind
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self._count = 0

    def _wrap(self, base: PreTrainedModel, block: MoeBlock) -> PerftLayer:
        parent, _, child = block.name.rpartition(".")
        layer = PerftLayer(base.get_submodule(block.name), block, self._trace, self._mixed)
        setattr(base.get_submodule(parent), child, layer)
        return layer

    def run(self, members: Sequence[Member], at_once: int, progress: Callable[[Sequence[Member]], None]) -> None:
        """Trains all that wait."""
        waiting = [member for member in members if member.state == "waiting"]
        trainees: list[_Trainee] = []
        progress(members)
        while waiting or trainees:
            while waiting and len(trainees) < at_once:
                member = waiting.pop(0)
                member.state = "training"
                self._count += 1
                try:
                    trainees.append(_Trainee(member, self, f"m{self._count}"))
                except OSError as error:
                    _fail(member, f"its folder cannot be used: {error}")
            self._round(trainees)
            for trainee in trainees:
                if trainee.member.state != "training":
                    trainee.leave()
            trainees = [trainee for trainee in trainees if trainee.member.state == "training"]
            progress(members)

    def _round(self, trainees: Sequence[_Trainee]) -> None:
        """One optimiser step of each."""
        self._base.train()
        groups = {trainee: trainee.next_group() for trainee in trainees}
        counts = {t: sum((batch["labels"][..., 1:] != -100).sum() for batch in group) for t, group in groups.items()}
        for number in range(max(len(group) for group in groups.values())) if groups else ():
            parts = [
                (trainee, group[number])
                for trainee, group in groups.items()
                if number < len(group) and trainee.member.state == "training"
            ]
            for one_pass in self._passes(parts):
                self._train_pass(one_pass, counts)
        due = []
        for trainee in trainees:
            if trainee.member.state == "training":
                trainee.take_step()
                if trainee.eval_is_due:
                    due.append(trainee)
        if due:
            self._evaluate(due)
        for trainee in trainees:
            if trainee.member.state == "training":
                trainee.end_round()

    def _passes(self, parts: Sequence[tuple[_Trainee, MicroBatch]]) -> Iterator[list[tuple[_Trainee, MicroBatch]]]:
        """Micro-batches that go through the base together: of like length, packed ones apart, at most one of an adapter."""
        by_kind = sorted(parts, key=lambda part: ("position_ids" in part[1], part[1]["input_ids"].shape[1]))
        taken: list[tuple[_Trainee, MicroBatch]] = []
        for part in by_kind:
            rows = sum(batch["input_ids"].shape[0] for _, batch in [*taken, part])
            other_kind = taken and ("position_ids" in taken[0][1]) != ("position_ids" in part[1])
            if taken and (other_kind or rows * part[1]["input_ids"].shape[1] > self._tokens_per_pass):
                yield taken
                taken = []
            taken.append(part)
        if taken:
            yield taken

    def _logits(self, parts: Sequence[tuple[_Trainee, MicroBatch]]) -> list[Tensor]:
        """Logits of each micro-batch, computed in one pass; sets whose tokens are whose and leaves it set."""
        length = max(batch["input_ids"].shape[1] for _, batch in parts)
        padding = {"input_ids": self._pad_token_id, "attention_mask": 0, "position_ids": 0}
        inputs = {
            name: torch.cat(
                [nn.functional.pad(batch[name], (0, length - batch[name].shape[1]), value=value) for _, batch in parts]
            ).to(self.device)
            for name, value in padding.items()
            if name in parts[0][1]
        }
        first, owned, spans = 0, [], []
        places_BL = torch.arange(inputs["input_ids"].numel(), device=self.device).view(-1, length)
        for trainee, batch in parts:
            rows, own_length = batch["input_ids"].shape
            span = (slice(first, first + rows), slice(own_length))
            owned.append(AdapterTokens(name=trainee.name, tokens_T=places_BL[span].reshape(-1), stream=trainee.stream))
            spans.append(span)
            first += rows
        self._mixed.parts = tuple(owned)
        with torch.autocast(self.device.type, torch.bfloat16) if self._bfloat16 else nullcontext():
            logits = self._base(**inputs, use_cache=False).logits
        return [logits[span].contiguous() for span in spans]

    def _loss(self, logits: Tensor, batch: MicroBatch, num_items: Tensor | None = None) -> Tensor:
        """The base's own loss of one micro-batch."""
        vocab_size = self._base.config.get_text_config().vocab_size
        loss: Tensor = self._base.loss_function(
            logits, batch["labels"].to(self.device), vocab_size, num_items_in_batch=num_items
        )
        return loss

    def _train_pass(self, parts: Sequence[tuple[_Trainee, MicroBatch]], counts: dict[_Trainee, Any]) -> None:
        self._trace.start(recording=True)
        all_logits = self._logits(parts)
        traces = self._trace.stop()
        losses = []
        for (trainee, batch), logits in zip(parts, all_logits, strict=True):
            num_items = counts[trainee].to(self.device)
            loss = self._loss(logits, batch, num_items)
            if trainee.name in traces:
                loss = loss + trainee.router_loss(traces[trainee.name], batch, num_items)
            losses.append(loss)
        values = torch.stack([loss.detach().float() for loss in losses]).tolist()
        sound = []
        for (trainee, _), loss, value in zip(parts, losses, values, strict=True):
            trainee.loss_sum += value
            if math.isfinite(value):
                sound.append(loss)
            else:
                rate = trainee.member.config.learning_rate
                _fail(
                    trainee.member,
                    f"the loss became {value} by step {trainee.member.step + 1}; lower learning_rate (now {rate:g}) or raise "
                    "warmup",
                )
        if sound:
            torch.stack(sound).sum().backward()
        self._mixed.parts = ()

    @torch.no_grad()
    def _evaluate(self, trainees: Sequence[_Trainee]) -> None:
        """The mean loss of each on its held-out rows, weighed by rows as Trainer does."""
        self._base.eval()
        batches = {trainee: trainee.eval_batches() for trainee in trainees}
        sums = dict.fromkeys(trainees, 0.0)
        while batches:
            parts = []
            for trainee in list(batches):
                batch = next(batches[trainee], None)
                if batch is None:
                    del batches[trainee]
                else:
                    parts.append((trainee, batch))
            for one_pass in self._passes(parts):
                for (trainee, batch), logits in zip(one_pass, self._logits(one_pass), strict=True):
                    sums[trainee] += float(self._loss(logits, batch)) * batch["input_ids"].shape[0]
                self._mixed.parts = ()
        for trainee, total in sums.items():
            trainee.note_evaluation(total / len(trainee.member.eval_data))

    def collator(self) -> PaddingCollator:
        """Makes batches of rows."""
        return PaddingCollator(pad_token_id=self._pad_token_id)


class _Trainee:
    """A member that is training: its parameters in the layers, its optimiser, its place in the data."""

    def __init__(self, member: Member, fleet: Fleet, name: str) -> None:
        self.member, self.name = member, name
        self._fleet = fleet
        self._folder = Path(member.config.output)
        self._arguments = trainer_arguments(member.config, has_eval=member.eval_data is not None)
        self._loader = DataLoader(
            member.train_data,
            batch_size=member.config.batch_size,
            sampler=_sampler(member.train_data, member.config.seed),
            collate_fn=fleet.collator(),
        )
        accumulation = member.config.gradient_accumulation
        self._steps_per_epoch = math.ceil(len(self._loader) / accumulation)
        member.total_steps = (
            math.ceil(self._arguments.num_train_epochs * self._steps_per_epoch)
            if member.config.max_steps is None
            else member.config.max_steps
        )
        self.stream = RandomStream(member.config.seed)
        with self.stream:  # the draws of a run by itself, in its order
            self._attach()
        self.stream = RandomStream(member.config.seed)
        self._parameters = {
            f"{layer.block.name}.{kind}": getattr(layer, kind)[name]
            for layer in fleet.layers
            for kind in layer.adapter_layer_names
            if name in getattr(layer, kind)
        }
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(self._arguments)
        self._optimizer = optimizer_class(
            [{"params": list(self._parameters.values()), "weight_decay": self._arguments.weight_decay}], **settings
        )
        self._scheduler = get_scheduler(
            self._arguments.lr_scheduler_type,
            self._optimizer,
            num_warmup_steps=self._arguments.get_warmup_steps(member.total_steps),
            num_training_steps=member.total_steps,
        )
        self._best: dict[str, Tensor] | None = None
        self._best_loss, self._waited = math.inf, 0
        self.loss_sum, self._logged_step = 0.0, 0
        self._router_sum: Tensor | float = 0.0
        self._router_count, self._health = 0, RouterHealth()
        self._seconds, self._since = 0.0, time.perf_counter()
        self._log = LogCallback(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_record(self._folder, member.record)
        checkpoint = last_checkpoint(self._folder)
        self._resumed = checkpoint is not None
        if checkpoint is not None:
            self._load(checkpoint)
        states = self.stream.states
        self._groups = self._group_from(member.step)
        self._primed: list[MicroBatch] | None = None
        if (
            member.step % self._steps_per_epoch
        ):  # an epoch begins with a draw, which this one made before the checkpoint
            self._primed = next(self._groups)
            self.stream.states = states

    def _attach(self) -> None:
        adapter = self.member.adapter
        adapter.base_model_name_or_path = self.member.config.model
        chosen = {block.name for block in resolve_config(adapter, self._fleet.blocks)}
        for layer in self._fleet.layers:
            if layer.block.name in chosen:
                layer.update_layer(self.name, adapter)
                for kind in layer.adapter_layer_names:
                    if self.name in getattr(layer, kind):
                        getattr(layer, kind)[self.name].requires_grad_(True)

    def leave(self) -> None:
        """Takes the adapter off the layers."""
        for layer in self._fleet.layers:
            if self.name in layer.perft_config:
                layer.delete_adapter(self.name)

    def next_group(self) -> list[MicroBatch]:
        """The micro-batches of the next optimiser step."""
        group, self._primed = self._primed, None
        return next(self._groups) if group is None else group

    def _group_from(self, step: int) -> Iterator[list[MicroBatch]]:
        """Groups of micro-batches from optimiser step `step` on, epoch after epoch."""
        sampler: Any = self._loader.sampler
        accumulation = self.member.config.gradient_accumulation
        epoch, skip = divmod(step, self._steps_per_epoch)
        while True:
            sampler.set_epoch(epoch)
            with self.stream:
                batches = iter(self._loader)
            for _ in range(skip * accumulation):
                next(batches)
            while group := [batch for _, batch in zip(range(accumulation), batches, strict=False)]:
                yield group
            epoch, skip = epoch + 1, 0

    def eval_batches(self) -> Iterator[MicroBatch]:
        """The held-out rows, in their order."""
        loader = DataLoader(
            self.member.eval_data, batch_size=self.member.config.batch_size, collate_fn=self._fleet.collator()
        )
        with self.stream:
            return iter(loader)

    def router_loss(self, logits: list[Tensor], batch: MicroBatch, num_items: Tensor) -> Tensor:
        """The weighted load-balancing loss of its router, as its share of the optimiser's batch."""
        adapter = self.member.adapter
        assert adapter.top_k is not None
        assert adapter.router_aux_loss_coef is not None
        mask = batch["token_mask"] if "token_mask" in batch else batch["attention_mask"]
        mask_T = mask.to(logits[0].device).reshape(-1) != 0
        loss = router_load_balancing_loss(logits, adapter.top_k, mask_T)
        self._router_sum, self._router_count = self._router_sum + loss.detach(), self._router_count + 1
        self._health.add(logits, adapter.top_k, mask_T)
        return share_of_batch(batch["labels"].to(loss.device), num_items) * adapter.router_aux_loss_coef * loss

    def take_step(self) -> None:
        """Clips, steps, and logs if that is due."""
        member = self.member
        parameters = list(self._parameters.values())
        limit = member.config.max_grad_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(parameters, limit))
        rate = self._scheduler.get_last_lr()[0]
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        member.step += 1
        if member.step == 1 or member.step % member.config.log_steps == 0:
            entry = {
                "loss": self.loss_sum / (member.step - self._logged_step),
                "grad_norm": norm,
                "learning_rate": rate,
                "epoch": member.step / self._steps_per_epoch,
                "step": member.step,
            }
            if self._router_count:
                entry["router_aux_loss"] = float(self._router_sum) / self._router_count
            member.history.append(entry | self._health.take())
            self.loss_sum, self._logged_step = 0.0, member.step
            self._router_sum, self._router_count = 0.0, 0

    @property
    def _is_last(self) -> bool:
        return self.member.step >= self.member.total_steps

    def _is_due(self, steps: int | None) -> bool:
        if steps is None:
            return self._is_last or self.member.step % self._steps_per_epoch == 0
        return self.member.step % steps == 0

    @property
    def eval_is_due(self) -> bool:
        """Whether the step just taken is one after which it is evaluated."""
        return self.member.eval_data is not None and self._is_due(self.member.config.eval_steps)

    def note_evaluation(self, loss: float) -> None:
        """Logs it, keeps the best adapter, and ends the training if nothing better has come for long enough."""
        member = self.member
        member.history.append({"eval_loss": loss, "epoch": member.step / self._steps_per_epoch, "step": member.step})
        better = loss < self._best_loss
        self._waited = 0 if better else self._waited + 1
        if better:
            self._best_loss = loss
            if member.config.keeps_best:
                self._best = {key: value.detach().clone() for key, value in self._parameters.items()}

    def end_round(self) -> None:
        """Writes what is due: log, checkpoint, or the finished adapter."""
        member = self.member
        patience = member.config.early_stopping
        stopped = patience is not None and self._waited >= patience
        try:
            if self._is_last or stopped:
                if stopped and not self._is_last:
                    member.reason = f"no better eval_loss in {patience} evaluations"
                self._finish()
            elif self._is_due(member.config.save_steps):
                self._save()
        except OSError as error:
            _fail(member, f"cannot write to {self._folder}: {error}")

    def _finish(self) -> None:
        member = self.member
        if self._best is not None:
            for key, value in self._best.items():
                self._parameters[key].data.copy_(value)
        outcome = {
            "steps": member.step,
            "seconds": round(self._seconds + time.perf_counter() - self._since, 1),
            "resumed": self._resumed,
            "fleet": True,
            **count_examples(member.train_data, member.eval_data),
        }
        write_finished(
            self._fleet.layers,
            self.name,
            member.adapter,
            member.config,
            {**member.record, "outcome": outcome},
            member.history,
        )
        self._log.write(member.history)
        member.state = "done"

    def _save(self) -> None:
        """A checkpoint, whole or not at all; older ones go."""
        member, states = self.member, self._optimizer.state_dict()["state"]
        tensors = {f"parameter/{key}": value.detach() for key, value in self._parameters.items()}
        tensors |= {f"best/{key}": value for key, value in (self._best or {}).items()}
        tensors |= {f"random/{number}": state for number, state in enumerate(self.stream.states)}
        tensors |= {f"optimizer/{number}/{key}": t for number, state in states.items() for key, t in state.items()}
        place = {
            "step": member.step,
            "history": member.history,
            "scheduler": self._scheduler.state_dict(),
            "rates": [group["lr"] for group in self._optimizer.param_groups],
            "best_loss": self._best_loss,
            "waited": self._waited,
            "loss_sum": self.loss_sum,
            "logged_step": self._logged_step,
            "router": [float(self._router_sum), self._router_count],
            "seconds": self._seconds + time.perf_counter() - self._since,
        }
        parent = self._folder / CHECKPOINTS
        target, part = parent / f"{_FOLDER}{member.step}", parent / "part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, part / "state.safetensors")
        (part / "place.json").write_text(json.dumps(place), encoding="utf-8")
        part.replace(target)
        for old in _checkpoints(self._folder)[: -member.config.keep_checkpoints]:
            shutil.rmtree(old)
        self._log.write(member.history)

    def _load(self, checkpoint: Path) -> None:
        member = self.member
        tensors = load_file(checkpoint / "state.safetensors")
        place = json.loads((checkpoint / "place.json").read_text(encoding="utf-8"))
        for key, parameter in self._parameters.items():
            parameter.data.copy_(tensors[f"parameter/{key}"])
        best = {
            key: tensors[f"best/{key}"].to(p.device) for key, p in self._parameters.items() if f"best/{key}" in tensors
        }
        self._best = best or None
        num_states = sum(key.startswith("random/") for key in tensors)
        self.stream.states = [tensors[f"random/{number}"] for number in range(num_states)]
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("optimizer/"):
                _, number, name = key.split("/")
                state.setdefault(int(number), {})[name] = tensor
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})
        self._scheduler.load_state_dict(place["scheduler"])
        for group, rate in zip(self._optimizer.param_groups, place["rates"], strict=True):
            group["lr"] = rate
        member.step, member.history = place["step"], place["history"]
        self._best_loss, self._waited = place["best_loss"], place["waited"]
        self.loss_sum, self._logged_step = place["loss_sum"], place["logged_step"]
        self._router_sum, self._router_count = place["router"]
        self._seconds = place["seconds"]


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint of a member of a fleet."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def _checkpoints(folder: Path) -> list[Path]:
    found = (folder / CHECKPOINTS).glob(f"{_FOLDER}*")
    return sorted(found, key=lambda path: int(path.name.removeprefix(_FOLDER)))


def _sampler(data: Any, seed: int) -> Any:
    """The order in which Trainer and Accelerate go through the data of a run by itself."""
    from accelerate.data_loader import SeedableRandomSampler  # of the extra `train`

    return SeedableRandomSampler(data, data_seed=seed)


def _fail(member: Member, reason: str) -> None:
    member.state, member.reason = "failed", reason


def _check_recipes(recipes: Sequence[tuple[str, TrainConfig, PerftConfig | LoraRecipe]]) -> None:
    if not recipes:
        raise PerftError("no recipe to train")
    label, common, _ = recipes[0]
    outputs: dict[Path, str] = {}
    for other, config, adapter in recipes:
        for name in _COMMON:
            if getattr(config, name) != getattr(common, name):
                raise PerftError(
                    f"one run has one base and one way through it: {name} is {getattr(common, name)!r} in {label}, "
                    f"{getattr(config, name)!r} in {other}"
                )
        output = Path(config.output).resolve()
        if output in outputs:
            raise PerftError(f"{outputs[output]} and {other} write to one folder, {config.output}")
        outputs[output] = other
        if config.streaming:
            raise PerftError(
                f"{other}: streaming is for `perft train`; many adapters at once need data that can be counted"
            )
        if config.mixed_precision == "float16":
            raise PerftError(
                f"{other}: mixed_precision=float16 scales one loss; many at once train with bfloat16 or none"
            )
        if config.report_to:
            raise PerftError(
                f"{other}: report_to is for `perft train`; here the log of each adapter is a file in its folder"
            )
        if config.gradient_checkpointing and adapter.dropout > 0:
            raise PerftError(
                f"{other}: with gradient_checkpointing a forward pass runs twice, and the dropout of many adapters cannot be "
                "drawn alike twice; give up one of the two"
            )


def _check_folder(member: Member, *, resume: bool, overwrite: bool) -> None:
    """Whether the member's folder is fit for what is asked; marks it as done if it is."""
    output = Path(member.config.output)
    if not resume or overwrite or (output.exists() and not output.is_dir()):
        check_output(output, member.record, resume=resume, overwrite=overwrite)
        return
    if not output.exists():
        return
    record = read_record(output)
    if record is None:
        if any(output.iterdir()):
            raise PerftError(f"output {output} is not empty and holds no run that could be resumed")
        return
    check_same_run(record, member.record, output)
    if "outcome" in record:
        member.state, member.reason = "done", "was done before"
        member.step = member.total_steps = record["outcome"]["steps"]
        member.history = [record["outcome"].get("metrics", {})]


def _check_base(base: PreTrainedModel) -> None:
    """Refuses a base whose training pass is random or whose loss joins rows: there, adapters would depend on each other."""
    text = base.config.get_text_config()
    for name, value in text.to_dict().items():
        if ("dropout" in name or "jitter" in name) and isinstance(value, float) and value > 0:
            raise PerftError(
                f"the base's config has {name}={value}: its training pass draws at random for all rows together, so adapters "
                "in one batch would not be trained as alone; train them one by one"
            )
    if getattr(text, "output_router_logits", False):
        raise PerftError(
            "the base's config has output_router_logits=true: its router's loss joins all rows of a batch; train one by one"
        )
