"""transformers' Trainer with packs: one item of its data loader is an optimizer step's rows."""

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import patch_environment
from accelerate.utils.memory import clear_device_cache
from torch.utils.data import DataLoader, SequentialSampler
from transformers import TrainingArguments

from steps.text2sql import collectives, packing, ranks
from steps.text2sql.checkpoints import ResumableTrainer
from steps.text2sql.errors import UserError
from steps.text2sql.gradients import Gradients
from steps.text2sql.memory_plan import Plan
from steps.text2sql.packed_attention import summed_loss
from steps.text2sql.packing import SHAPE_TOKENS, Pack, Row
from steps.text2sql.tokenization import lengths

logger = logging.getLogger(__name__)
OUT_OF_MEMORY = (
    "the GPU is out of memory with {tokens} tokens at once; give gradient_checkpointing=yes, a smaller "
    "micro_batch_tokens, or prepare the data with a smaller max_length."
)


class Shuffled(SeedableRandomSampler):
    """Rows in the order of seed and epoch, also in a training that goes on amid an epoch."""

    epoch_now: Callable[[], int]

    def __iter__(self) -> Iterator[int]:
        """Indices of all rows."""
        self.set_epoch(self.epoch_now())
        yield from super().__iter__()


class PackedTrainer(ResumableTrainer):
    """Trains on rows with `input_ids` and `labels`; the loss is the mean over all answer tokens of a step.

    Every process sees the rows of the whole step in the same order and computes its share of the packs. That
    order is a function of seed and epoch alone. Gradients are added up once a step; accelerate's wrappers,
    which would do so in each backward pass, are left out. A divided base is divided before: `sharding.shard`.
    """

    def __init__(self, *args: Any, plan: Plan, longest: int, replay: bool, **named: Any) -> None:
        with patch_environment(accelerate_use_fsdp="false"):
            super().__init__(*args, **named)
        self.accelerator.prepare_model = functools.partial(
            self.accelerator.prepare_model, evaluation_mode=True
        )
        self.plan = plan
        self.multiple = SHAPE_TOKENS if replay else 1
        self.longest = -(-longest // SHAPE_TOKENS) * SHAPE_TOKENS
        self.gradients = Gradients(
            self.model, longest=self.longest, dtype=compute_dtype(self.args), replay=replay
        )
        self.has_halved = False
        self._log_waiting: Callable[[], None] = lambda: None
        # Else its time would count as that of the steps before.
        self.gradients.before_recording = lambda: self._log_waiting()

    def get_train_dataloader(self) -> DataLoader:
        """Batches of rows, unpadded and not divided among processes."""
        sampler = self._order(lambda: self.state.global_step // self._steps_per_epoch)
        return self._loader(self.train_dataset, self.args.train_batch_size, sampler)

    def _order(self, epoch: Callable[[], int]) -> Shuffled:
        """Indices of the rows in the order of an epoch."""
        sampler = Shuffled(self.train_dataset, generator=torch.Generator(), data_seed=self.args.seed)
        sampler.epoch_now = epoch
        return sampler

    @property
    def _steps_per_epoch(self) -> int:
        return -(-len(self.train_dataset) // self.args.train_batch_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """All validation rows at once, so that their loss is the mean over their answer tokens."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return self._loader(rows, len(rows), SequentialSampler(rows))

    def _loader(self, rows: Any, size: int, sampler: Any) -> DataLoader:
        return DataLoader(rows, batch_size=size, sampler=sampler, collate_fn=list)

    def training_step(self, model: Any, rows: list[Row], num_items_in_batch: Any = None) -> torch.Tensor:
        """Gradients of a step; when memory runs out, once in a training, the step starts again with halves.

        Raises:
            UserError: memory ran out twice.
        """
        model.train()
        loss = self._computed(rows)
        collectives.add_up(self.gradients.flat)
        collectives.add_up(loss)
        self._log_waiting()
        self.state.num_input_tokens_seen += sum(len(row["input_ids"]) for row in rows)
        return loss

    def _computed(self, rows: list[Row]) -> torch.Tensor:
        """As `_step`. Before the first that is recorded comes the largest of all: recordings share their
        memory, and would take new memory for each that is larger than all before."""
        is_first = self.gradients.replay and not self.gradients.graphs
        for one in [self._largest_rows(), rows] if is_first else [rows]:
            loss = self._step(one)
            if loss is None:
                self._halve(one)
                return self._computed(rows)
        return loss

    def _largest_rows(self) -> list[Row]:
        """Rows of the step with the largest pack, of all that are left."""
        tokens = lengths(self.train_dataset).to_numpy()
        shape = {"capacity": self.plan.tokens, "processes": self.args.world_size}
        indices = max(self._steps_left(), key=lambda step: packing.largest(tokens[step].tolist(), **shape))
        return [self.train_dataset[i] for i in indices]

    def _steps_left(self) -> Iterator[list[int]]:
        """Indices of the rows of each step to come, of this one first."""
        size, step = self.args.train_batch_size, self.state.global_step
        while step < self.state.max_steps:
            epoch, done = divmod(step, self._steps_per_epoch)
            order = list(self._order(lambda epoch=epoch: epoch))[done * size :]
            left = min(self.state.max_steps - step, -(-len(order) // size))
            yield from (order[at : at + size] for at in range(0, left * size, size))
            step = (epoch + 1) * self._steps_per_epoch

    def _step(self, rows: list[Row]) -> torch.Tensor | None:
        """Share of this process in the loss, with its gradients; None when memory ran out in any process."""
        share = torch.full((), 1 / packing.answer_tokens(rows), device=self.args.device)
        scaler = self.accelerator.scaler  # of fp16, whose small gradients would vanish
        scale = scaler.scale(share) if scaler else share
        self.gradients.clear()
        try:
            loss = torch.zeros_like(share)
            for one in self._packs(rows):
                loss += self.gradients.add(one, scale)
        except torch.cuda.OutOfMemoryError as error:
            if ranks.is_sharded():  # the others wait for this one's part of a layer, and cannot be told
                raise UserError(OUT_OF_MEMORY.format(tokens=self.plan.tokens)) from error
            loss = None
        if collectives.largest(loss is None):
            return None
        return loss * share / scale

    def _halve(self, rows: list[Row]) -> None:
        if self.has_halved:
            raise UserError(OUT_OF_MEMORY.format(tokens=self.plan.tokens))
        largest = collectives.largest(max(one.input_ids.shape[1] for one in self._packs(rows)))
        self.has_halved, self.plan = True, self.plan.halved(largest=int(largest))
        logger.warning("\nOut of memory: going on with %d tokens at once", self.plan.tokens)
        self.gradients.forget_graphs()
        clear_device_cache(garbage_collection=True)

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: torch.Tensor, *others: Any, **named: Any
    ) -> None:
        """As in Trainer, but where steps are recorded, what is to be logged alone is logged in the next step.

        The GPU has that step to do while the numbers come: after waiting for them it would idle until the
        recording is launched, 15 ms for the 8,000 launches of a step of Mistral-7B.
        """
        control, log = self.control, super()._maybe_log_save_evaluate
        comes_more = control.should_evaluate or control.should_save or control.should_training_stop
        if comes_more or not (control.should_log and self.gradients.replay):
            log(tr_loss, grad_norm, *others, **named)
            return
        numbers = fetching(torch.stack((tr_loss, grad_norm)))
        tr_loss.zero_()
        control.should_log = False

        def log_waiting() -> None:
            self._log_waiting = lambda: None
            self.control.should_log = True
            log(*numbers(), *others, **named)

        self._log_waiting = log_waiting

    def store_flos(self) -> None:
        """Nothing: these are not counted, and adding them up over processes would wait for the GPU."""

    def _packs(self, rows: list[Row], *, multiple: int | None = None) -> list[Pack]:
        """Packs of this process; each process has as many."""
        packs = packing.pack_evenly(
            rows,
            capacity=self.plan.tokens,
            multiple=multiple or self.multiple,
            processes=self.args.world_size,
        )
        return packs[self.args.process_index :: self.args.world_size]

    def prediction_step(
        self, model: Any, inputs: list[Row], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """Mean loss of the rows' answer tokens. Layers run as they are: compiling them once more for a
        pass without gradients takes longer."""
        packs = self._packs(inputs, multiple=1)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), self.compute_loss_context_manager():
            loss = sum(summed_loss(model, one.to(self.args.device), longest=self.longest) for one in packs)
        return collectives.add_up(loss) / packing.answer_tokens(inputs), None, None


def fetching(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to copy a tensor to the CPU; the function waits for the copy, and for nothing that came later."""
    copy = tensor.to("cpu", non_blocking=True)
    ready = torch.cuda.Event() if tensor.is_cuda else None
    if ready:
        ready.record()

    def fetched() -> torch.Tensor:
        if ready:
            ready.synchronize()
        return copy

    return fetched


def compute_dtype(settings: TrainingArguments) -> torch.dtype:
    """What the forward pass computes in, under autocast where it is not fp32."""
    return torch.bfloat16 if settings.bf16 else torch.float16 if settings.fp16 else torch.float32
