"""Rollouts for Tunix's learners: a pool in the place of an engine that Tunix runs itself.

Invariant: what `generate` returns was made by the weights that were handed over last, or by newer ones, for every
prompt that was asked for, in order; where that cannot be had it raises.

```python
from functools import partial

from rollpool.producer import CheckpointFolder, RolloutPool
from rollpool.producer.tunix import PoolRollout

folder = CheckpointFolder("/mnt/policies", like="/models/Qwen3-4B")  # where every host sees it
pool = RolloutPool("redis://…", pool="math", run="grpo-7", params=folder)
config = ClusterConfig(rollout_engine=partial(PoolRollout, pool=pool), …)   # the rest as for any engine
GRPOLearner(RLCluster(actor=…, cluster_config=config, …), …).train(prompts)
```

`rollout_engine` is a class, or a `functools.partial` of one, which Tunix calls with the model, the tokenizer, the mesh
of `Role.ROLLOUT` and the rollout configuration. Where the hosts are other machines, give `Role.ROLLOUT` the trainer's
mesh: nothing of the rollouts runs on it. Leave `offload_to_cpu` off: Tunix moves the rollout's own model then, and this
one has none. LoRA training is refused: Tunix hands over the adapter's weights alone.
"""

import contextlib
import importlib
import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rollpool.producer.blocking import Batch, RolloutPool
from rollpool.schemas.errors import RollpoolError, SettingsError
from rollpool.schemas.results import Sample

if TYPE_CHECKING:
    #: Tunix need not be here to check this module.
    _Base = object
else:
    try:
        from tunix.rl.rollout.base_rollout import BaseRollout as _Base
    except ImportError:
        # Only making one fails: whoever lists or documents the package imports this without Tunix.
        _Base = object

_LOG = logging.getLogger("rollpool.producer")

#: The engine whose names Tunix's mappings lead to.
_BACKEND = "sglang_jax"


class PoolRollout(_Base):
    """A `BaseRollout` of Tunix whose samples a pool makes; for pools of many hosts and for those of this process.

    A prompt that occurs several times, as Tunix repeats each for its group, is one job of as many samples.
    """

    def __init__(
        self,
        *,
        pool: RolloutPool,
        tokenizer: Any = None,
        rollout_actor: Any = None,
        rollout_config: Any = None,
        mesh: Any = None,
        mapping: Any = None,
        max_staleness: int | None = 0,
        publish_first: bool = True,
        wait: float = 1.0,
        timeout: float | None = None,
    ) -> None:
        """Take part in a pool, and hand over the weights that training begins with.

        Args:
            pool: With a sink for parameters, as `RolloutPool(params=CheckpointFolder(…))`. Its run is this trainer's.
            tokenizer: Tunix's, or one that it adapts, as Hugging Face's. Given by Tunix, as are the next three.
            rollout_actor: The model that is trained; None: `get_per_token_logps` cannot be asked.
            rollout_config: `RolloutConfig`; its temperature and its `rollout_mapping_config` are read here.
            mesh: Not used.
            mapping: How the model's names are translated: `MappingConfig`, or a dict with its fields; None: that of
                `rollout_config`, else the model's own for sglang-jax.
            max_staleness: Versions that samples may be older than the weights handed over last; None: any. Over 0,
                correct the ratio with the log-probs that come with the samples.
            publish_first: Publish the model's weights now, under the next version. False where the pool serves them
                already.
            wait: Part of the hosts to wait for after each publication, until they serve it; a host that fails to is
                told at once. 0: go on, and the jobs wait in the pool.
            timeout: Seconds until such a wait, and a generation, raise; None: never.

        Raises:
            RollpoolError: Tunix is not installed.
            SettingsError: There is no tokenizer, or neither a model to publish nor a policy that the pool serves.
            PolicyRejected: The weights cannot be published.
        """
        _tunix("rl.rollout.base_rollout")
        if tokenizer is None:
            raise SettingsError("PoolRollout: tokenizer is missing; give the one of the model")
        adapter = _tunix("generate.tokenizer_adapter").TokenizerAdapter
        self._tokenizer = tokenizer if isinstance(tokenizer, adapter) else adapter(tokenizer)
        self._pool = pool
        self._model = rollout_actor
        self._temperature = float(getattr(rollout_config, "temperature", 1.0))
        self._mapping = _mapping(mapping, rollout_config, rollout_actor)
        self._max_staleness = max_staleness
        self._wait = wait
        self._timeout = timeout
        self._told_of_seed = False
        # The learner may generate in one thread and hand weights over in another.
        self._lock = threading.Lock()
        current = pool.current_policy()
        self._version = current.version if current else -1
        if publish_first and rollout_actor is not None:
            nnx = importlib.import_module("flax.nnx")
            self.update_params(nnx.state(rollout_actor, nnx.Param))
        elif current is None:
            raise SettingsError(
                "PoolRollout: the pool serves no policy, and no model's weights are to be published; give "
                "rollout_actor, or publish the weights that training begins with"
            )

    @property
    def version(self) -> int:
        """The policy that was published last: what the next `generate` asks for."""
        return self._version

    def generate(self, prompts: Sequence[str], rollout_config: Any, **kwargs: Any) -> Any:
        """Generate one completion for each prompt; see `BaseRollout`.

        Args:
            prompts: Texts, rendered by the caller.
            rollout_config: Lengths, temperature, top-p, top-k and end tokens are read. A seed is not: hosts draw
                freely.
            **kwargs: Further fields of `SamplingParams`.

        Returns:
            `RolloutOutput`, with the log-probs of the tokens always; stop tokens are part of a completion.

        Raises:
            InvalidPrompt: A prompt or a parameter is wrong.
            PoolTimeout: Not all completions were there in time; what is open was cancelled.
            RollpoolError: A prompt has no completions; the message says why.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = {text: self._encoded(text) for text in texts}
        samples = self._samples(texts, ids, self._sampling(rollout_config, kwargs))
        tokens = [np.asarray(sample.output_ids, np.int32) for sample in samples]
        return _tunix("rl.rollout.base_rollout").RolloutOutput(
            text=[self._tokenizer.decode(each.tolist()) for each in tokens],
            logits=None,
            tokens=tokens,
            left_padded_prompt_tokens=self._padded([ids[text] for text in texts], rollout_config.max_prompt_length),
            logprobs=[np.asarray(sample.logprobs, np.float32) for sample in samples],
        )

    def get_per_token_logps(self, prompt_tokens: Any, completion_tokens: Any) -> Any:
        """Compute log-probs [B, T] of completions by the model that is trained, as it is now; see `BaseRollout`.

        They are those of the temperature-scaled distribution, as the learner's own and those of the samples are.

        Raises:
            SettingsError: No model was given.
        """
        if self._model is None:
            raise SettingsError("PoolRollout: log-probs need the model; give rollout_actor")
        graph, state = importlib.import_module("flax.nnx").split(self._model)
        return _tunix("rl.common").compute_per_token_logps(
            graph,
            state,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            pad_id=self.pad_id(),
            eos_id=self.eos_id(),
            stop_gradient=True,
            return_logits=False,
            temperature=self._temperature,
        )

    def update_params(self, params: Any, filter_types: tuple[Any, ...] | None = None) -> None:
        """Publish weights as the next policy, and wait until it is served; see `BaseRollout`.

        When it returns, or raises, the trainer may overwrite its arrays.

        Args:
            params: An `nnx.State` of the whole model.
            filter_types: Not used: what is missing in a state is told by its name.

        Raises:
            PolicyRejected: They are not those of the model, or a host failed to take them up.
            PoolTimeout: Not all hosts served them in time.
        """
        with self._lock, _transfers_allowed():
            current = self._pool.current_policy()
            # A call that failed may have published all the same: other weights then need another version.
            version = max(self._version, current.version if current else -1) + 1
            self._pool.publish_policy(version, params=params, mapping=self._mapping)
            self._version = version
        if self._wait:
            self._pool.wait_for_policy(version, fraction=self._wait, timeout=self._timeout)

    def pad_id(self) -> int:
        """The token that pads."""
        return int(self._tokenizer.pad_id())

    def eos_id(self) -> int:
        """The token that ends a completion."""
        return int(self._tokenizer.eos_id())

    def model(self) -> None:
        """None: the pool's weights are not in this process, so that Tunix hands them over after each step."""
        return

    def _encoded(self, text: str) -> list[int]:
        """As Tunix's own samplers do."""
        start = self._tokenizer.bos_id()
        ids = [*([start] if start else []), *self._tokenizer.encode(text)]
        return [int(token) for token in self._tokenizer.dedup_bos_ids(ids)]

    def _sampling(self, config: Any, more: Mapping[str, Any]) -> dict[str, Any]:
        if config.seed is not None and not self._told_of_seed:
            self._told_of_seed = True
            _LOG.warning("PoolRollout: hosts draw freely, the seed of rollout_config has no effect")
        return {
            "max_new_tokens": int(config.max_tokens_to_generate),
            "temperature": float(config.temperature),
            "top_p": 1.0 if config.top_p is None else float(config.top_p),
            "top_k": -1 if config.top_k is None else int(config.top_k),
            "stop_token_ids": [int(token) for token in config.eos_tokens or [self.eos_id()]],
            **more,
        }

    def _samples(self, texts: list[str], ids: Mapping[str, list[int]], sampling: dict[str, Any]) -> list[Sample]:
        """A sample for each text, in order. Texts that occur equally often are one batch."""
        times: dict[int, list[str]] = {}
        for text, count in Counter(texts).items():
            times.setdefault(count, []).append(text)
        made: dict[str, Iterator[Sample]] = {}
        with self._lock:
            version = self._version
        with contextlib.ExitStack() as stack:
            batches: list[tuple[list[str], Batch]] = []
            for count, some in times.items():
                batch = self._pool.enqueue_prompts(
                    [ids[text] for text in some],
                    policy_version=version,
                    n=count,
                    sampling=sampling,
                    max_staleness=self._max_staleness,
                    timeout=self._timeout,
                )
                stack.callback(_done_with, batch)
                batches.append((some, batch))
            for some, batch in batches:
                for group in batch.collect(timeout=self._timeout):
                    made[some[group.index]] = iter(group.samples)
                _check_whole(batch)
        return [next(made[text]) for text in texts]

    def _padded(self, prompts: Sequence[Sequence[int]], length: int) -> NDArray[np.int32]:
        """Prompts [B, P], padded on the left; to the next power of two where one is longer than was said."""
        longest = max(map(len, prompts))
        width = length if longest <= length else 1 << (longest - 1).bit_length()
        padded = np.full((len(prompts), width), self.pad_id(), np.int32)
        for row, prompt in zip(padded, prompts, strict=True):
            row[width - len(prompt) :] = prompt
        return padded


def _tunix(module: str) -> Any:
    try:
        return importlib.import_module(f"tunix.{module}")
    except ImportError as error:
        raise RollpoolError(
            f"PoolRollout is for Tunix, which cannot be imported here: {error}; pip install google-tunix"
        ) from error


def _mapping(given: Any, config: Any, model: Any) -> Any:
    found = given if given is not None else getattr(config, "rollout_mapping_config", None)
    if found is None and model is None:
        return None
    try:
        return _tunix("generate.mappings").MappingConfig.build(mapping_obj=found, model=model, backend=_BACKEND)
    except RuntimeError as error:
        raise SettingsError(f"PoolRollout: {error} Give one as mapping, by names of Hugging Face") from error


def _done_with(batch: Batch) -> None:
    """Consumed, or given up; an error on the way out must not hide the first."""
    try:
        if batch.report().open:
            batch.cancel()
        batch.commit()
    except RollpoolError as error:
        _LOG.warning("batch %s stays on the server: %s", batch.id, error)


def _check_whole(batch: Batch) -> None:
    if batch.dropped:
        first = batch.dropped[0]
        raise RollpoolError(
            f"{len(batch.dropped)} of {batch.size} prompts of batch {batch.id} have no completions, which Tunix needs "
            f"of all; the first is {first.outcome}: {first.error}"
        )


@contextlib.contextmanager
def _transfers_allowed() -> Iterator[None]:
    """On CPU, Tunix forbids transfers while it hands weights over; slicing and checking them takes some."""
    jax = importlib.import_module("jax")
    with jax.transfer_guard("allow"):
        yield
