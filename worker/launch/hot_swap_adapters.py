"""Adapters (LoRA) that come and go while the engine serves.

The engine's own pool gives an adapter a slot at its first use, never frees one, cuts a rank that is too large, pays no
heed to tensors that it does not know, and ends the server when slots run out.

Invariant: each adapter that is loaded has a slot of its own, has every number of its file there, and keeps it until
no request names it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from rollpool.worker.launch import hot_swap_boundary as boundary
    from rollpool.worker.launch import hot_swap_weights as weights
    from rollpool.worker.launch.hot_swap_adapter_rules import Limits, check_adapter
    from rollpool.worker.launch.hot_swap_messages import Refused
else:
    import hot_swap_boundary as boundary
    import hot_swap_weights as weights
    from hot_swap_adapter_rules import Limits, check_adapter
    from hot_swap_messages import Refused


class Adapters:
    """The adapters of one scheduler.

    Args:
        scheduler: Constructed.
        runner: Its `ModelRunner`.
    """

    def __init__(self, scheduler: Any, runner: Any) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._manager = runner.lora_manager
        #: Adapters at once: the pool's first slot is that of requests without one.
        self.slots: int = self._manager.max_loras_per_batch - 1
        # Those that are being read, by id: they have a slot coming.
        self._coming: set[str] = set()

    def is_loaded(self, lora_id: str) -> bool:
        """Tell whether an adapter can serve a request."""
        return lora_id in self._manager.loras

    def reserve(self, lora_id: str) -> None:
        """Keep a slot for an adapter.

        Raises:
            Refused: All are taken.
        """
        if len(self._manager.loras) + len(self._coming) >= self.slots:
            raise Refused(f"all {self.slots} slots hold adapters: unload one first, or launch with more")
        self._coming.add(lora_id)

    def give_up(self, lora_id: str) -> None:
        """Free the slot of an adapter that does not come."""
        self._coming.discard(lora_id)
        self._forget(lora_id)

    def read(self, lora_id: str, lora_name: str, path: str) -> Any:
        """Read an adapter into the host's memory, beside the serving model.

        Returns:
            The engine's own `LoRAAdapter`.

        Raises:
            Refused: The engine would not apply all of it as it was trained.
        """
        check_adapter(Path(path), self._limits())
        from sgl_jax.srt.configs.load_config import LoadConfig
        from sgl_jax.srt.lora.lora import LoRAAdapter
        from sgl_jax.srt.lora.lora_config import LoRAConfig

        try:
            manager = self._manager
            adapter = LoRAAdapter(
                uid=lora_id,
                config=LoRAConfig(path),
                base_hf_config=manager.base_hf_config,
                load_config=LoadConfig(),
                lora_backend=manager.lora_backend,
            )
            adapter.initialize_weights()
        except Exception as error:
            raise Refused(f"the engine cannot read the adapter {path}: {error}") from error
        for name, value in _tensors(adapter):
            if not np.isfinite(np.asarray(value, dtype=np.float32)).all():
                raise Refused(f"{path}: {name} holds numbers that are not finite")
        self._check_places(adapter, path)
        return adapter

    def put(self, lora_id: str, adapter: Any) -> None:
        """Write an adapter into its slot; between two batches only."""
        manager, pool = self._manager, self._manager.memory_pool
        self._coming.discard(lora_id)
        manager.configs[lora_id], manager.loras[lora_id] = adapter.config, adapter
        pool.prepare_lora_batch(cur_uids={lora_id}, lora_adapters=manager.loras)
        manager.update_lora_info()
        weights.resplit(self._runner)

    def unload(self, lora_id: str, lora_name: str) -> None:
        """Free an adapter's slot.

        Raises:
            Refused: It is not loaded, or a request uses it.
        """
        if lora_id not in self._manager.loras:
            raise Refused(f"no adapter {lora_name} is loaded")
        if users := self._users(lora_id):
            raise Refused(f"{len(users)} requests still use the adapter {lora_name}")
        self._forget(lora_id)

    def _users(self, lora_id: str) -> set[Any]:
        held = [*boundary.unfinished(self._scheduler), *self._scheduler.pending_dp_reqs]
        return {rid for each in held if each.lora_id == lora_id for rid in boundary.rids_of(each)}

    def _forget(self, lora_id: str) -> None:
        manager, pool = self._manager, self._manager.memory_pool
        for known in (manager.configs, manager.loras, manager.lora_refs):
            known.pop(lora_id, None)
        slot = pool.uid_to_buffer_id.pop(lora_id, None)
        if slot is not None:
            from sgl_jax.srt.lora.lora_memory_pool import EMPTY_SLOT

            pool.buffer_id_to_uid[slot] = EMPTY_SLOT

    def _limits(self) -> Limits:
        pool = self._manager.memory_pool
        shapes = {}
        for module in pool.target_modules:
            inputs, outputs = pool._get_lora_a_shape(module)[2], pool._get_lora_b_shape(module)[1]
            if module in ("k_proj", "v_proj") and pool.needs_kv_replication:
                outputs = pool.original_num_kv_heads * pool.head_dim  # The engine repeats the heads itself.
            shapes[module] = (outputs, inputs)
        return Limits(max_rank=pool.max_lora_rank, layers=pool.num_layers, modules=shapes)

    def _check_places(self, adapter: Any, path: str) -> None:
        """See that the engine's pool finds each of the adapter's tensors when it fills a slot."""
        pool = self._manager.memory_pool
        found = set()
        for index, layer in enumerate(adapter.layers):
            for module in pool.target_modules:
                found |= {id(each) for each in pool._extract_module_weights(layer.weights, index, module)}
        if lost := [name for name, value in _tensors(adapter) if id(value) not in found]:
            raise Refused(f"{path}: the engine finds no place for {lost[0]} and {len(lost) - 1} more")


def _tensors(adapter: Any) -> Iterator[tuple[str, Any]]:
    for layer in adapter.layers:
        yield from layer.weights.items()
    yield from adapter.weights.items()
