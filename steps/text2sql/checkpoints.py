"""Checkpoints of a training: safetensors and JSON, there whole or not at all, from which it goes on exactly.

On a CPU a training that goes on ends with the very bits of one that never stopped. What that rests on: the
order of the rows is a function of seed and epoch, and the position in it is the number of optimizer steps.
Trainer's own checkpoints hold pickles, so the methods with which it saves and loads them are overridden.
"""

import json
import random
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from steps.text2sql import adapter, collectives, correction, ranks
from steps.text2sql.errors import UserError
from steps.text2sql.processes import on_signals

STATE = "training_state.json"
TENSORS = "training_state.safetensors"


# Values


class Packer:
    """Turns nested values into what JSON can hold; `tensors` has their tensors by name, shared ones once.

    Dictionaries keep the types of their keys, and tuples stay apart from lists.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def pack(self, value: Any) -> Any:
        """A value in the form that `unpack` takes."""
        if isinstance(value, torch.Tensor):
            key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
            name = self._names.setdefault(key, str(len(self._names)))
            self.tensors[name] = value.detach()
            return {"tensor": name}
        if isinstance(value, numpy.ndarray):
            return {"array": value.tolist(), "dtype": str(value.dtype)}
        if isinstance(value, dict):
            return {"dict": [[key, self.pack(one)] for key, one in value.items()]}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [self.pack(one) for one in value]}
        return value


def unpack(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The value that `Packer.pack` took."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "array" in value:
        return numpy.array(value["array"], dtype=value["dtype"])
    if "dict" in value:
        return {key: unpack(one, tensors) for key, one in value["dict"]}
    [(kind, items)] = value.items()
    return {"list": list, "tuple": tuple}[kind](unpack(one, tensors) for one in items)


def write_values(values: Any, folder: Path) -> None:
    """Write nested values and their tensors as one JSON and one safetensors file."""
    packer = Packer()
    (folder / STATE).write_text(json.dumps(packer.pack(values)), encoding="utf-8")
    save_file({n: t.cpu().contiguous().clone() for n, t in packer.tensors.items()}, folder / TENSORS)


def read_values(folder: Path) -> Any:
    """What `write_values` wrote.

    Raises:
        UserError: it is something else.
    """
    try:
        packed = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return unpack(packed, load_file(folder / TENSORS))
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder.name}: is no checkpoint of train: {error!r}.") from error


# State


def random_states() -> dict[str, Any]:
    """States of all generators that a training draws from."""
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Go on drawing where `random_states` was taken."""
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state(states["cuda"][0])


def spread_random_state(salt: int) -> None:
    """Have all but the first of several processes draw numbers of their own, as dropout needs."""
    if ranks.index():
        torch.manual_seed(torch.initial_seed() + ranks.index() * 1_000_003 + salt)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Give an optimizer the state that its `state_dict` once returned.

    The states of bitsandbytes are copied into memory that it allocates itself: `load_state_dict` would put
    ordinary tensors in the place of paged ones, which no longer leave a full GPU (bitsandbytes issue 1381).
    """
    if not isinstance(optimizer, Optimizer8bit):
        optimizer.load_state_dict(saved)
        return
    optimizer.check_overrides()
    optimizer.initialized = True
    for index, group in enumerate(optimizer.param_groups):
        group.update({k: v for k, v in saved["param_groups"][index].items() if k != "params"})
        for position, parameter in enumerate(group["params"]):
            state = saved["state"].get(saved["param_groups"][index]["params"][position])
            if state is not None:  # a parameter that never had a gradient has none
                optimizer.init_state(group, parameter, index, position)
                _fill(optimizer.state[parameter], _flat(state))


def _flat(state: Mapping[str, Any]) -> dict[str, Any]:
    # bitsandbytes wraps its quantized states in a further dictionary.
    inner = [value for value in state.values() if isinstance(value, dict)]
    flat = {name: value for name, value in state.items() if not isinstance(value, dict)}
    return flat | {name: value for one in inner for name, value in one.items()}


def _fill(state: dict[str, Any], saved: Mapping[str, Any]) -> None:
    for name, value in saved.items():
        if isinstance(value, torch.Tensor):
            state[name].copy_(value)
        else:
            state[name] = value


# Training


class Checkpoints(TrainerCallback):
    """When a checkpoint is saved: every `save_steps` steps, and once more when a signal stops the training.

    `save` gets the step and a function that writes what the training needs to go on into a folder. With
    `resume_from`, a checkpoint's folder, the training goes on from it. Several processes stop after the same
    step, whichever of them got the signal.
    """

    def __init__(
        self,
        save: Callable[[int, Callable[[Path], None]], None],
        *,
        save_steps: int,
        resume_from: Path | None = None,
    ) -> None:
        self.save = save
        self.save_steps = save_steps
        self.resume_from = resume_from
        self.stopped_by = ""
        self._signal = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint, and end the training after the current step if a signal came.

        The Trainer saves after it has logged and validated, so that both happen once.
        """
        is_last = state.global_step >= state.max_steps
        number = int(collectives.largest(self._signal))
        if number:
            self.stopped_by = signal.Signals(number).name
            control.should_training_stop = True
        control.should_save = not is_last and bool(
            self.stopped_by or state.global_step % self.save_steps == 0
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget a signal that came after the last step: nothing is left to stop but to keep the adapter."""
        if state.global_step >= state.max_steps:
            self.stopped_by = ""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM as a wish to stop after the current step; a second SIGINT stops at once."""
        with on_signals(self._stop):
            yield

    def _stop(self, number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if self._signal:
            if number == signal.SIGINT:
                raise KeyboardInterrupt(name)
            return  # launchers and process groups send SIGTERM again
        self._signal = number
        print(
            f"\n{name}: saving a checkpoint after this step; Ctrl-C once more stops at once.",
            flush=True,
        )


class ResumableTrainer(Trainer):
    """A Trainer that saves and loads this project's checkpoints instead of its own.

    `train(resume_from_checkpoint=checkpoints.resume_from)` skips the rows that were seen, as in Trainer.
    """

    def __init__(self, *args: Any, checkpoints: Checkpoints, **named: Any) -> None:
        super().__init__(*args, **named)
        self.checkpoints = checkpoints
        self.add_callback(checkpoints)

    def write_state(self, folder: Path) -> None:
        """Write all that the rest of the training depends on, but the adapter's weights."""
        scaler = self.accelerator.scaler
        values = {
            "optimizer": self.optimizer.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "random": random_states(),
            # Losses since the last report, and before it.
            "loss": [self._tr_loss, self._total_loss_scalar, self._globalstep_last_logged],
        }
        write_values(values, folder)
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.checkpoints.save(self.state.global_step, self.write_state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint:
            values = read_values(Path(checkpoint))
            load_optimizer(self.optimizer.optimizer, values["optimizer"])
            self.lr_scheduler.load_state_dict(values["scheduler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        state = read_values(Path(checkpoint))["scaler"] if checkpoint else None
        if state and self.accelerator.scaler:  # a checkpoint of bf16 has none
            self.accelerator.scaler.load_state_dict(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # The Trainer calls this last, when it has fetched the rows of the first step.
        if checkpoint:
            values = read_values(Path(checkpoint))
            set_random_states(values["random"])
            spread_random_state(self.state.global_step)
            loss, self._total_loss_scalar, self._globalstep_last_logged = values["loss"]
            self._tr_loss.copy_(loss)


def load_weights(model: PeftModel, checkpoint: Path) -> None:
    """Put the weights of a checkpoint into an adapter of the same shape.

    Raises:
        RuntimeError: the shapes differ.
    """
    correction.load_weights(model, load_file(checkpoint / adapter.WEIGHTS))
