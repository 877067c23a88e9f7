"""The template of the prompt: reading and checking a user's own, and putting one into a model's chat form."""

import string
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from steps.text2sql.errors import UserError

if TYPE_CHECKING:  # main reads parameters without loading transformers
    from transformers import PreTrainedTokenizerFast

FIELDS = ("context", "question")
# MLflow's prompt registry keeps at most 100,000 characters; the chat form and doubled braces need some.
MAX_CHARACTERS = 50_000
# Stand for the fields while the chat template is rendered, which could change braces.
MARKS = {name: f"\u27e6{name}\u27e7" for name in FIELDS}


def read(path: Path) -> str:
    """Text of a template file, checked: `{context}` and `{question}`, nothing else, a line break at its end.

    Braces that are not fields are doubled, as in `str.format`.

    Raises:
        ValueError: saying what is wrong with it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"cannot be read: {error}") from error
    problems = list(_problems(text))
    if problems:
        raise ValueError("; ".join(problems))
    return text


def _problems(text: str) -> list[str]:
    try:
        fields = [(name, spec, how) for _, name, spec, how in string.Formatter().parse(text)]
    except ValueError as error:
        return [f"has a brace that is no field ({error}); double it: {{{{ or }}}}"]
    found = {
        name + (f"!{how}" if how else "") + (f":{spec}" if spec else "")
        for name, spec, how in fields
        if name is not None
    }
    problems = [
        f"lacks {{{name}}}" + (f"; {double} is text, take single braces" if double in text else "")
        for name in FIELDS
        if name not in found and (double := f"{{{{{name}}}}}")
    ]
    others = ", ".join(f"{{{name}}}" for name in sorted(found - set(FIELDS)))
    if others:
        problems.append(
            f"has {others}, but only {{context}} and {{question}} are filled; double other braces"
        )
    if not text.endswith("\n"):
        problems.append("must end with a line break, so that prompt and answer share no token")
    if len(text) > MAX_CHARACTERS:
        problems.append(f"has {len(text)} characters, more than {MAX_CHARACTERS}")
    return problems


def as_chat(template: str, tokenizer: "PreTrainedTokenizerFast", *, base_model: str) -> str:
    """Template as a user's turn in the model's own chat form, up to where the assistant answers.

    The chat template is rendered here, once: what it writes of its own, such as today's date, then stays.

    Raises:
        UserError: the tokenizer has no chat template, or it does not carry the message as it is.
    """
    problem = f"prompt_style=chat: the tokenizer of base_model={base_model}"
    if not tokenizer.chat_template:
        raise UserError(
            f"{problem} has no chat template; give an instruct model that has one, or prompt_style=plain."
        )
    message = {"role": "user", "content": template.rstrip("\n").format(**MARKS)}
    try:
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError) as error:
        raise UserError(f"{problem} has a chat template that cannot be rendered: {error}.") from error
    if message["content"].strip() not in text:
        raise UserError(f"{problem} has a chat template that changes the message; give prompt_style=plain.")
    text = text.replace("{", "{{").replace("}", "}}")
    for name, mark in MARKS.items():
        text = text.replace(mark, f"{{{name}}}")
    return text
