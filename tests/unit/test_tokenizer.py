"""From a prompt to the ids an engine is sent."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import job
from tokenizers import Tokenizer

from rollpool.ops.local.tiny_model import VOCAB_SIZE, make_tiny_model
from rollpool.schemas import Message
from rollpool.worker.tokenizer import PromptEncoder, PromptRefused, needs_thread

HELLO: list[Message] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tokenizer") / "tiny", seed=0)


@pytest.fixture
def checkpoint(tiny: Path, tmp_path: Path) -> Path:
    """The small files of a checkpoint, to be changed by a test."""
    for file in tiny.glob("*.json"):
        shutil.copy(file, tmp_path)
    return tmp_path


def configure(checkpoint: Path, **changes: Any) -> PromptEncoder:
    path = checkpoint / "tokenizer_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return PromptEncoder(str(checkpoint))


def test_ids_are_sent_as_they_came(tiny: Path) -> None:
    ids = np.array([5, 1, VOCAB_SIZE - 1], np.int32)
    assert PromptEncoder(str(tiny)).encode(ids) is ids


def test_an_id_outside_the_vocabulary_is_refused(tiny: Path) -> None:
    with pytest.raises(PromptRefused, match=f"{VOCAB_SIZE} is outside the vocabulary"):
        PromptEncoder(str(tiny)).encode(np.array([1, VOCAB_SIZE], np.int32))


def test_text_becomes_int32_ids(tiny: Path) -> None:
    encoder = PromptEncoder(str(tiny))
    ids = encoder.encode("hello")
    assert ids.dtype == np.int32
    assert ids.size > 0
    assert ids.tolist() != encoder.encode("hello ").tolist()


def test_the_truncation_and_padding_saved_with_a_tokenizer_are_of_its_training(checkpoint: Path) -> None:
    whole = PromptEncoder(str(checkpoint)).encode("a prompt of many tokens")
    path = str(checkpoint / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=6)
    tokenizer.save(path)
    assert PromptEncoder(str(checkpoint)).encode("a prompt of many tokens").tolist() == whole.tolist()


def test_messages_become_the_ids_of_the_rendered_template(tiny: Path) -> None:
    encoder = PromptEncoder(str(tiny))
    text = encoder.render(HELLO)
    assert text.endswith("<|im_start|>assistant\n")
    assert encoder.encode(HELLO).tolist() == encoder.encode(text).tolist()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch OWNED') }}",
        "{{ messages.append.__self__.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ messages.append('x') }}",
        "{% set _ = messages[0].update({'content': 'x'}) %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(checkpoint: Path, template: str) -> None:
    encoder = configure(checkpoint, chat_template=template)
    messages = [dict(message) for message in HELLO]
    rendered = ""
    with contextlib.suppress(PromptRefused):
        rendered = encoder.render(messages)
    assert (rendered, messages) == ("", HELLO)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 // 0 }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ messages[7].content.x }}",
        "{{ [1][9] + {}['x'] }}",
        "{{ range(100001) | list }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_whatever_a_template_fails_with_refuses_the_prompt_and_not_the_host(checkpoint: Path, template: str) -> None:
    encoder = configure(checkpoint, chat_template=template)
    with pytest.raises(PromptRefused, match=r"refused the messages: .+"):
        encoder.encode(HELLO)


def test_a_template_says_itself_why_it_refuses(checkpoint: Path) -> None:
    encoder = configure(checkpoint, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(PromptRefused, match="roles must alternate"):
        encoder.encode(HELLO)


def test_text_that_looks_like_a_template_is_text(tiny: Path) -> None:
    assert "{{ 1 + 1 }}" in PromptEncoder(str(tiny)).render([{"role": "user", "content": "{{ 1 + 1 }}"}])


def test_templates_have_what_hugging_face_gives_them(checkpoint: Path) -> None:
    template = (
        "{% for message in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ message | tojson }}{% endgeneration %}{% endfor %}"
        "{{ eos_token }}{{ {'a': 'é'} | tojson(ensure_ascii=true) }}{{ strftime_now('%Y') | length }}"
    )
    text = configure(checkpoint, chat_template=template).render([*HELLO, *HELLO])
    assert text == '{"role": "user", "content": "hello"}<|im_end|>{"a": "\\u00e9"}4'


def test_the_default_of_several_named_templates_is_used(checkpoint: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "chat"}]
    assert configure(checkpoint, chat_template=named).render(HELLO) == "chat"


def test_a_template_file_wins_over_the_config(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text("from the file")
    assert PromptEncoder(str(checkpoint)).render(HELLO) == "from the file"


def test_messages_without_a_template_are_refused(checkpoint: Path) -> None:
    encoder = configure(checkpoint, chat_template=None)
    with pytest.raises(PromptRefused, match="has no chat template"):
        encoder.encode(HELLO)
    assert encoder.encode("text").size > 0


def test_a_template_that_renders_nothing_is_refused(checkpoint: Path) -> None:
    with pytest.raises(PromptRefused, match="no tokens"):
        configure(checkpoint, chat_template="{# nothing #}").encode(HELLO)


@pytest.mark.parametrize("model", ["", "/no/such/checkpoint", "gs://bucket/checkpoint"])
def test_without_a_tokenizer_ids_go_on_and_text_is_refused(tmp_path: Path, model: str) -> None:
    encoder = PromptEncoder(model or str(tmp_path))
    assert encoder.encode(np.array([10**6], np.int32)).tolist() == [10**6]
    with pytest.raises(PromptRefused, match=r"no tokenizer\.json"):
        encoder.encode("text")


def test_only_text_and_messages_need_a_thread() -> None:
    assert [needs_thread(job(prompt=prompt)) for prompt in ("x", HELLO, [1, 2])] == [True, True, False]
