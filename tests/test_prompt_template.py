"""A user's own template of the prompt: what is read, what is refused, and its chat form."""

import re

import pytest

from steps.text2sql import prompt_template
from steps.text2sql.errors import UserError
from steps.text2sql.sql_model import PROMPT_TEMPLATE, render_prompt
from tests.conftest import CHAT_TEMPLATE, chat_tokenizer, tiny_tokenizer


def read(tmp_path, content):
    path = tmp_path / "prompt.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return prompt_template.read(path)


@pytest.mark.parametrize(
    "text",
    [
        PROMPT_TEMPLATE,
        "{question}{context}\n",
        "{question} {context} {question}\n",
        "{{}} {context}{question}\n",
    ],
)
def test_a_template_with_both_fields_is_read_as_it_is(tmp_path, text):
    assert read(tmp_path, text) == text


def test_a_template_of_windows_is_read_without_its_byte_order_mark_and_with_plain_line_breaks(tmp_path):
    assert read(tmp_path, b"\xef\xbb\xbf{context}\r\n{question}\r\n") == "{context}\n{question}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "lacks {context}"),
        ("{context}\n", "lacks {question}"),
        ("{context} {{question}}\n", "lacks {question}; {{question}} is text, take single braces"),
        ("{context} {question} {schema}\n", "has {schema}, but only"),
        ("{context} {question} {}\n", "has {}, but only"),
        ("{context} {question} {0}\n", "has {0}, but only"),
        ("{context} {question.__class__}\n", "has {question.__class__}, but only"),
        ("{context} {question!r}\n", "has {question!r}, but only"),
        ("{context} {question:>9}\n", "has {question:>9}, but only"),
        ("{context} {question} {\n", "double it: {{ or }}"),
        ("{context} {question} }\n", "double it: {{ or }}"),
        ("{context} {question}", "must end with a line break"),
        ("{context} {question}" + "x" * 50_000 + "\n", "more than 50000"),
        (b"{context} {question} \xff\n", "not UTF-8 at byte 21"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused_with_the_reason(tmp_path, text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        read(tmp_path, text)


def test_all_that_is_wrong_with_a_template_is_said_at_once(tmp_path):
    with pytest.raises(
        ValueError, match="lacks {context}; lacks {question}; has {table}.*; must end with a line"
    ):
        read(tmp_path, "{table}")


def test_the_chat_form_is_the_models_own_up_to_the_answer():
    chat = prompt_template.as_chat(
        "Tables: {context}\nAsked: {question}\n", chat_tokenizer(), base_model="tiny"
    )
    assert chat == (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n"
        "<|im_start|>user\nTables: {context}\nAsked: {question}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_braces_of_the_template_and_of_the_chat_template_stay_braces():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("You are helpful.", 'Answer {"sql": ...}')
    chat = prompt_template.as_chat("{{}} {context} {question}\n", tokenizer, base_model="tiny")
    filled = render_prompt(chat, question="Q", context="{C}", style="chat")
    assert 'Answer {"sql": ...}<|im_end|>' in filled
    assert "{} {C} Q<|im_end|>" in filled


def test_a_base_without_a_chat_template_is_named_with_the_way_out():
    with pytest.raises(UserError) as caught:
        prompt_template.as_chat(PROMPT_TEMPLATE, tiny_tokenizer(), base_model="a/base")
    for words in ("prompt_style=chat", "base_model=a/base has no chat template", "prompt_style=plain"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "chat_template", ["{{ raise_exception('no') }}", "{{ messages[0].content | upper }}", "{%"]
)
def test_a_chat_template_that_fails_or_changes_the_message_is_refused(chat_template):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = chat_template
    with pytest.raises(
        UserError, match="prompt_style=chat: the tokenizer of base_model=tiny has a chat template"
    ):
        prompt_template.as_chat("{context} {question}\n", tokenizer, base_model="tiny")
