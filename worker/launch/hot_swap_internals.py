"""What the changes to the engine rely on, and whether the installed engine still is so.

The engine's main line moves daily and promises nothing about its inside. Each expectation below names what would go
wrong without it.

Invariant: nothing of the engine is changed here, and what passes is as the patches were written for.
"""

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_SCHEDULER = "sgl_jax.srt.managers.scheduler:Scheduler"
_TOKENIZER = "sgl_jax.srt.managers.tokenizer_manager:TokenizerManager"
_DETOKENIZER = "sgl_jax.srt.managers.detokenizer_manager:DetokenizerManager"
_RUNNER = "sgl_jax.srt.model_executor.model_runner:ModelRunner"
_LOADER = "sgl_jax.srt.utils.weight_utils:WeightLoader"
_SHAPES = "sgl_jax.srt.model_executor.compilation_manager:CompilationManager"
_POOL = "sgl_jax.srt.lora.lora_memory_pool:LoRAMemoryPool"
_LORA = "sgl_jax.srt.lora.lora_manager:LoRAManager"


@dataclass(frozen=True)
class Expected:
    """One thing that the engine must have.

    Attributes:
        where: Module, colon, dotted name.
        parameters: Of the function, in order; None: whatever they are.
        holds: Pieces of the source that do what is relied upon.
    """

    where: str
    parameters: tuple[str, ...] | None = None
    holds: tuple[str, ...] = ()


EXPECTED = (
    # Orders reach their handlers, and replies theirs.
    Expected("sgl_jax.utils:TypeBasedDispatcher.__init__", holds=("self._mapping = mapping",)),
    Expected(
        "sgl_jax.utils:TypeBasedDispatcher.__call__", holds=("for ty, fn in self._mapping", "isinstance(obj, ty)")
    ),
    Expected(
        f"{_SCHEDULER}.__init__",
        holds=(
            "self._request_dispatcher = TypeBasedDispatcher(",
            "self.tp_worker = TpWorkerClass(",
            "self.waiting_queue: list[Req] = []",
            "self.pending_dp_reqs",
            "self.chunked_reqs = ",
            "self.lora_paths = server_args.lora_paths",
            "self._engine_paused = False",
        ),
    ),
    Expected(
        f"{_SCHEDULER}.process_input_requests", ("self", "recv_reqs"), ("self.send_to_tokenizer.send_pyobj(output)",)
    ),
    Expected(f"{_SCHEDULER}.event_loop_normal", holds=("self.process_input_requests(recv_reqs)",)),
    Expected(
        f"{_SCHEDULER}.event_loop_overlap",
        holds=(
            "self.process_input_requests(recv_reqs)",
            "self.result_queue.append((batch.copy(), result))",
            "self.result_queue.popleft()",
        ),
    ),
    Expected(f"{_SCHEDULER}.handle_generate_request", ("self", "recv_req"), ("lora_id=recv_req.lora_id",)),
    Expected("sgl_jax.srt.managers.schedule_batch:Req.set_finish_with_abort", ("self", "error_msg")),
    # Running requests can be retracted, none is lost, and no old keys and values are left.
    Expected(
        f"{_SCHEDULER}.get_next_batch_to_run",
        holds=(
            "self._prepare_chunked_reqs_to_exclude()",
            "self._process_pending_chunked_aborts()",
            "self.last_batch.filter_batch(chunked_req_to_exclude=chunked_req_to_exclude)",
            "not self.last_batch.is_empty() and not self.last_batch.is_prefill_only",
            "self.running_batch.merge_batch(self.last_batch)",
        ),
    ),
    Expected(
        f"{_SCHEDULER}.pause_generation",
        ("self", "recv_req"),
        (
            "self._sync_chunked_req_owners()",
            "self.process_batch_result(tmp_batch, tmp_result)",
            "self.running_batch.filter_batch()",
            "self.running_batch.retract_all(self.server_args)",
            "self._retract_parked_chunked_reqs(retracted_reqs)",
        ),
    ),
    Expected("sgl_jax.srt.managers.io_struct:PauseGenerationReqInput"),
    Expected(
        f"{_SCHEDULER}.flush_cache",
        ("self",),
        (
            "self.tree_cache.reset()",
            "self.req_to_token_pool.clear()",
            "self.token_to_kv_pool_allocator.clear()",
            "self.running_batch = ScheduleBatch.init_new(",
            "return True,",
        ),
    ),
    Expected("sgl_jax.srt.managers.schedule_batch:Req.reset_for_retract", ("self",), ("self.prefix_indices = []",)),
    # The model's arguments are its variables, in the order in which they split.
    Expected(
        f"{_RUNNER}.initialize_jit",
        holds=(
            "model_def, model_state = nnx.split(self.model)",
            "self.model_state_leaves, model_state_def = jax.tree_util.tree_flatten(model_state)",
            "self._model_state_def = model_state_def",
            "model_state_def,\n                    self.model_state_leaves,",
        ),
    ),
    Expected(
        "sgl_jax.srt.managers.tp_worker:ModelWorker.prepare_lora_batch",
        holds=("nnx.split(self.model_runner.model)", "self.model_runner.model_state_leaves, _ ="),
    ),
    # The loader loads into a model of its own.
    Expected(
        f"{_RUNNER}.load_model",
        ("self",),
        ("self.model = self.model_loader.load_model(", "self.model_config.configure_for_tensor_parallel("),
    ),
    Expected("sgl_jax.srt.model_loader.loader:JAXModelLoader._get_model", holds=("nnx.eval_shape(", "load_weights(")),
    Expected(
        f"{_LOADER}.load_weights_from_safetensors",
        ("self", "weight_mappings", "safetensors_partition", "dummy"),
        ("for key, mapping in weight_mappings.items():", "nnx.update(self.model, params)"),
    ),
    Expected("sgl_jax.srt.utils.weight_utils:tqdm"),
    Expected("sgl_jax.srt.configs.model_config:ModelConfig.from_server_args"),
    # A step can be run to look at its logits.
    Expected(
        f"{_SHAPES}._make_dummy_batch",
        (
            "self",
            "bs",
            "num_tokens",
            "mode",
            "max_cache_loc_size",
            "speculative_algorithm",
            "dp_size",
            "per_dp_bs_size",
        ),
    ),
    Expected(f"{_SHAPES}._precompile_decode", holds=("self.bs_buckets", "self.cache_loc_buckets[i]")),
    Expected(
        "sgl_jax.srt.managers.tp_worker:ModelWorker.forward_batch_generation",
        holds=("skip_sample: bool = False", "logits_output,\n            next_token_ids_device,\n"),
    ),
    # Spans travel with the tokens they are about.
    Expected(
        f"{_SCHEDULER}.stream_output_generation",
        holds=("self.send_to_detokenizer.send_pyobj(out)", "completion_tokens.append(len(output_ids_))"),
    ),
    Expected(f"{_DETOKENIZER}.handle_batch_token_id_out", ("self", "recv_obj"), ("return BatchStrOut(",)),
    Expected(f"{_DETOKENIZER}.__init__", holds=("(BatchTokenIDOut, self.handle_batch_token_id_out)",)),
    Expected(
        f"{_TOKENIZER}._handle_batch_output",
        ("self", "recv_obj"),
        ("state = self.rid_to_state.get(rid, None)", "state.out_list.append(out_dict)", '"meta_info": meta_info'),
    ),
    Expected(f"{_TOKENIZER}._handle_abort_req", ("self", "recv_obj"), ("state = self.rid_to_state[recv_obj.rid]",)),
    Expected(f"{_TOKENIZER}.auto_create_handle_loop", ("self",)),
    Expected(
        f"{_TOKENIZER}.__init__", holds=("self._result_dispatcher = TypeBasedDispatcher(", "self.lora_registry =")
    ),
    # Both sides are launched through names that can be taken.
    Expected(
        "sgl_jax.srt.entrypoints.engine:_launch_subprocesses",
        holds=("target=run_scheduler_process", "target=run_detokenizer_process", '"ready"'),
    ),
    Expected(
        "sgl_jax.srt.managers.scheduler:run_scheduler_process", ("server_args", "port_args", "dp_rank", "pipe_writer")
    ),
    Expected("sgl_jax.srt.managers.detokenizer_manager:run_detokenizer_process", ("server_args", "port_args")),
    Expected(
        "sgl_jax.srt.entrypoints.http_server:launch",
        holds=("_launch_subprocesses_or_threads(", "tokenizer_manager, template_manager, scheduler_info"),
    ),
    Expected("sgl_jax.srt.entrypoints.http_server:app"),
    # Adapters fill slots, and slots can be freed.
    Expected(
        f"{_POOL}.prepare_lora_batch",
        ("self", "cur_uids", "lora_adapters"),
        ("self.uid_to_buffer_id[uid] = buffer_id", "self.buffer_id_to_uid[buffer_id] = uid", "== EMPTY_SLOT"),
    ),
    Expected(f"{_POOL}._extract_module_weights", ("self", "layer_weights", "layer_id", "module_name")),
    Expected(f"{_POOL}._get_lora_a_shape", ("self", "module_name")),
    Expected(f"{_POOL}._get_lora_b_shape", ("self", "module_name")),
    Expected(f"{_LORA}.update_lora_info", ("self",)),
    Expected(
        f"{_LORA}.prepare_lora_batch", holds=("lora_adapters=self.loras", "scalings[weight_indices[i]] = lora.scaling")
    ),
    Expected("sgl_jax.srt.lora.lora:LoRAAdapter.__init__", holds=("self.config.lora_alpha / self.config.r",)),
    Expected("sgl_jax.srt.lora.lora_registry:LoRARegistry.register"),
    Expected("sgl_jax.srt.lora.lora_registry:LoRARegistry.unregister"),
)


#: What an engine in the trainer's own process, and weights that come from memory, rely on beside.
EXPECTED_IN_PROCESS = (
    *EXPECTED,
    Expected(f"{_LOADER}._process_and_assign_weight", ("self", "params", "hf_key", "hf_weight", "mapping")),
    Expected("sgl_jax.srt.utils.weight_utils:WeightMapping"),
    Expected(
        "sgl_jax.srt.entrypoints.engine:_launch_threads",
        holds=(
            "configure_logger(server_args)",
            "_set_envs_and_config(server_args)",
            "run_scheduler_loop_thread_after_create(server_args, port_args)",
            "target=run_detokenizer_thread",
            "daemon=True",
        ),
    ),
    Expected("sgl_jax.srt.entrypoints.engine:Engine.__init__", holds=("atexit.register(self.shutdown)",)),
    Expected(
        "sgl_jax.srt.managers.scheduler:scheduler_loop_after_create",
        holds=("dispatch_scheduler_event_loop(scheduler, server_args)",),
    ),
    Expected(f"{_DETOKENIZER}.event_loop", holds=("self._request_dispatcher(recv_obj)",)),
    Expected(f"{_TOKENIZER}.handle_loop", ("self",)),
)


def unexpected(what: tuple[Expected, ...] = EXPECTED) -> str:
    """The first few things in which the installed engine is not as expected; empty where it is."""
    faults = [fault for expected in what for fault in _faults(expected)]
    more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
    return "; ".join(faults[:3]) + more


def _faults(expected: Expected) -> Iterator[str]:
    module, _, path = expected.where.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        yield f"{expected.where}: {error}"
        return
    try:
        if expected.parameters is not None:
            parameters = tuple(inspect.signature(found).parameters)
            if parameters != expected.parameters:
                yield f"{expected.where} takes {parameters}, not {expected.parameters}"
        source = inspect.getsource(found) if expected.holds else ""
    except (TypeError, ValueError, OSError) as error:
        yield f"{expected.where}: {error}"
        return
    for piece in expected.holds:
        if piece not in source:
            yield f"{expected.where} no longer holds {piece!r}"
