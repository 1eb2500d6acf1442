"""Tokens in: from a prompt to the ids the engine is sent, by the policy's own tokenizer.

Invariant: what the engine generates from is exactly `Group.prompt_ids`. Templates run in Jinja's sandbox, so that no
checkpoint and no payload makes this process run code.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray
from tokenizers import Tokenizer

from rollpool.schemas import Message, PromptJob, RollpoolError


class PromptRefused(RollpoolError, ValueError):  # noqa: N818 - in line with the words of the design
    """This prompt cannot be made into ids the policy knows; the job is at fault, not the host."""


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


class _Generation(Extension):
    """`{% generation %}`, by which templates mark what an assistant said: for training alone, so its body stands."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment Hugging Face renders chat templates in (transformers, `chat_template_utils`)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _locate(model: str, name: str) -> Path | None:
    """A file of a checkpoint directory, or of a model named as the hub names it."""
    directory = Path(model)
    if directory.is_dir():
        return directory / name if (directory / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, name))
    except LocalEntryNotFoundError:  # the hub cannot be reached: nothing is known of the file
        raise
    except (EntryNotFoundError, HFValidationError):  # HFValidationError: a path or a URL
        return None


def _json(path: Path | None) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path else {}


def _token_text(token: str | dict[str, Any] | None) -> str:
    return token.get("content", "") if isinstance(token, dict) else token or ""


def _whole(tokenizer: Tokenizer) -> Tokenizer:
    """Without the truncation and padding of the last training, which are saved with a tokenizer."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class PromptEncoder:
    """Turns prompts into token ids for one checkpoint."""

    def __init__(self, model: str) -> None:
        self._model = model
        tokenizer = _locate(model, "tokenizer.json")
        self._tokenizer = _whole(Tokenizer.from_file(str(tokenizer))) if tokenizer else None
        self._config = _json(_locate(model, "tokenizer_config.json"))
        self._template = self._load_template()
        #: 0 when the checkpoint does not say.
        self.vocab_size = int(_json(_locate(model, "config.json")).get("vocab_size", 0))

    def _load_template(self) -> Template | None:
        if path := _locate(self._model, "chat_template.jinja"):  # wins over the config, as in transformers
            return _environment().from_string(path.read_text(encoding="utf-8"))
        source = self._config.get("chat_template")
        if isinstance(source, list):  # several named templates: Hugging Face's default is the one called so
            source = next((each["template"] for each in source if each.get("name") == "default"), None)
        return _environment().from_string(source) if source else None

    def render(self, messages: Sequence[Message]) -> str:
        """Render chat messages up to where the assistant's answer begins."""
        if self._template is None:
            raise PromptRefused(f"chat messages were sent but {self._model} has no chat template; send text or ids")
        specials = {name: _token_text(self._config.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **specials)
        except Exception as error:  # a template is a program: it fails as it likes, and messages choose how
            what = str(error) or type(error).__name__
            raise PromptRefused(f"the chat template of {self._model} refused the messages: {what}") from error

    def encode(self, prompt: str | NDArray[np.int32] | Sequence[Message]) -> NDArray[np.int32]:
        """Ids of one prompt, int32 [P].

        Raises:
            PromptRefused: the prompt has ids the policy does not know, or there is no tokenizer or template for it.
        """
        if isinstance(prompt, np.ndarray):
            if self.vocab_size and int(prompt.max()) >= self.vocab_size:
                # The engine would accept it and read past its embedding table.
                raise PromptRefused(f"token id {int(prompt.max())} is outside the vocabulary of {self.vocab_size}")
            return prompt
        if self._tokenizer is None:
            raise PromptRefused(
                f"{self._model} has no tokenizer.json; send token ids, or save the fast tokenizer with it"
            )
        # A template writes its special tokens itself; plain text gets those the tokenizer adds.
        is_text = isinstance(prompt, str)
        text = prompt if isinstance(prompt, str) else self.render(prompt)
        ids = self._tokenizer.encode(text, add_special_tokens=is_text).ids
        if not ids:
            raise PromptRefused("the prompt has no tokens")
        return np.asarray(ids, dtype=np.int32)

    def decode(self, ids: NDArray[np.int32]) -> str:
        """Text of what was generated, special tokens included; empty where there is no tokenizer."""
        return "" if self._tokenizer is None else str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=False))


def needs_thread(job: PromptJob) -> bool:
    """True when encoding may take long enough to delay the event loop; ids are only looked at."""
    return not isinstance(job.prompt, np.ndarray)
