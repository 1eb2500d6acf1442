"""The scheduler's side of a change of weights: orders in, replies out, all on the scheduler's own thread.

Loading goes on in a thread beside it; what it found is taken up between two batches.

Invariants: no exception leaves this module into the scheduler's loop, where it would end the server, but one: that the
old weights cannot be put back; each order gets one reply; and a reply without success means that what served before
serves on, bit for bit.
"""

import dataclasses
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

if TYPE_CHECKING or __package__:
    from rollpool.worker.launch import hot_swap_boundary as boundary
    from rollpool.worker.launch import hot_swap_weights as weights
    from rollpool.worker.launch.hot_swap_adapters import Adapters
    from rollpool.worker.launch.hot_swap_files import check_checkpoint
    from rollpool.worker.launch.hot_swap_messages import (
        SPANS,
        VERSION_ENV,
        EngineFacts,
        LoadAdapter,
        Refused,
        Reply,
        Staging,
        UnloadAdapter,
        UpdateWeights,
    )
    from rollpool.worker.launch.hot_swap_params import Tensors
    from rollpool.worker.launch.hot_swap_spans import VersionMarks
else:
    import hot_swap_boundary as boundary
    import hot_swap_weights as weights
    from hot_swap_adapters import Adapters
    from hot_swap_files import check_checkpoint
    from hot_swap_messages import (
        SPANS,
        VERSION_ENV,
        EngineFacts,
        LoadAdapter,
        Refused,
        Reply,
        Staging,
        UnloadAdapter,
        UpdateWeights,
    )
    from hot_swap_params import Tensors
    from hot_swap_spans import VersionMarks

#: Seconds an idle scheduler leaves to a thread that loads; a request that comes meanwhile waits as long.
_NAP_S = 0.002

Staged = weights.StagedOnDevice | weights.StagedByLeaf


class NothingServes(Exception):  # noqa: N818 - what is said is what is
    """The old weights could not be put back: an engine that ends is better than one that serves a mixture."""


def unsupported(scheduler: Any) -> str:
    """Why this launch's weights are not changed; empty where they are."""
    args = scheduler.server_args
    not_tried = {
        "--nnodes": args.nnodes > 1,
        "--dp-size": args.dp_size > 1,
        "--multimodal": args.multimodal,
        "--speculative-algorithm": scheduler._is_spec_decode_enabled(),
        "--disaggregation-mode": args.disaggregation_mode != "null",
        "--pd-disaggregation": bool(args.pd_disaggregation),
        "--enable-static-lora": bool(args.enable_static_lora),
        "--ep-dispatch-algorithm": bool(args.ep_dispatch_algorithm),
        "--load-format dummy": str(args.load_format).lower().endswith("dummy"),
        # Its loading computes on all devices at once, which must not happen beside the serving model.
        "quantization": scheduler.model_config.quantization_config is not None,
        "an embedding model": not scheduler.is_generation,
        "an engine inside another program": scheduler._comm_backend is not None,
    }
    used = [name for name, is_used in not_tried.items() if is_used]
    return f"that is not done with {', '.join(used)}" if used else ""


class SchedulerSide:
    """What is added to one scheduler.

    Args:
        scheduler: Constructed, and not yet in its loop.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._runner = scheduler.tp_worker.worker.model_runner
        self._marks = VersionMarks(os.environ.get(VERSION_ENV, "0"))
        # What threads have ready for the scheduler's own thread.
        self._ready: queue.SimpleQueue[Callable[[], Reply]] = queue.SimpleQueue()
        self._at_work = 0  # Threads that have not been heard of yet.
        self._updating = False
        #: By the directory that stands for them: weights that came from memory, in the engine's own process.
        self._deposits: dict[str, Staged] = {}
        weights.resplit(self._runner)  # Says at once whether this works with this model.
        lora = bool(scheduler.server_args.enable_lora)
        self._adapters = Adapters(scheduler, self._runner) if lora else None
        if lora and scheduler.lora_paths is None:
            # None switches off the check that a batch holds no more adapters than there are slots.
            scheduler.lora_paths = []
        scheduler._request_dispatcher._mapping += [
            (UpdateWeights, self._answering(self._update)),
            (LoadAdapter, self._answering(self._load_adapter)),
            (UnloadAdapter, self._answering(self._unload_adapter)),
        ]
        scheduler.send_to_detokenizer = _SpansAttached(scheduler.send_to_detokenizer, self._marks)

    @property
    def facts(self) -> EngineFacts:
        """What this engine can do."""
        if self._adapters is None:
            return EngineFacts(hot_swap=True, lora="none", adapter_slots=0)
        return EngineFacts(hot_swap=True, lora="runtime", adapter_slots=self._adapters.slots)

    def begin_with(self, version: str) -> None:
        """Name the version of the weights that serve, before anything was generated for anybody."""
        self._marks.version = version

    def between_batches(self) -> None:
        """Take up what threads have ready; called in each turn of the scheduler's loop, its batches being done."""
        while not self._ready.empty():
            reply = self._ready.get()()
            self._at_work -= 1
            self._scheduler.send_to_tokenizer.send_pyobj(reply)
        if self._at_work and self._scheduler.last_batch is None:
            # With nothing to run the loop never waits, and a thread that loads hardly gets its turns: 6 s where it took
            # 1 s of the tiny model.
            time.sleep(_NAP_S)

    def deposit(self, directory: str, tensors: Tensors, staging: Staging) -> None:
        """Stage weights from memory, to be served by an `UpdateWeights` that names the directory.

        For the engine's own process, from a thread in which no other programs run on the tensors' devices. When it
        returns, nothing of `tensors` is needed any more. What was deposited before, and not served, is dropped.

        Args:
            directory: Has the config of the model that serves.
            tensors: By a checkpoint's names.
            staging: On the devices, beside what serves; or, by leaf, in the host's memory until then.

        Raises:
            Refused: They do not fit what serves, or hold numbers that are not finite.
        """
        self._deposits.clear()
        scheduler, runner = self._scheduler, self._runner

        def config() -> Any:
            return weights.config_of(type(scheduler.model_config), scheduler.server_args, directory)

        if staging == "device" or (staging == "auto" and weights.fits_beside(runner)):
            self._deposits[directory] = weights.StagedOnDevice(runner, config(), tensors)
        else:
            copies = {name: np.array(jax.device_get(tensor)) for name, tensor in tensors.items()}
            self._deposits[directory] = weights.StagedByLeaf(runner, config, copies)

    def has_deposit(self, directory: str) -> bool:
        """Tell whether `deposit` staged this, and nothing took its place since."""
        return directory in self._deposits

    def knows_adapter(self, lora_id: str | None) -> bool:
        """Tell whether a request for this adapter would be served with it."""
        return lora_id is None or self._adapters is None or self._adapters.is_loaded(lora_id)

    def _answering(self, handle: Callable[[Any], Reply | None]) -> Callable[[Any], Reply | None]:
        """A handler whose exceptions become its reply."""

        def answer(order: Any) -> Reply | None:
            return _safely(order.number, lambda: handle(order))

        return answer

    def _beside(self, number: int, work: Callable[[], Any], then: Callable[[Any], Reply]) -> None:
        """Work in a thread, then go on with its result between two batches."""

        def run() -> None:
            try:
                result = work()
            except BaseException as error:
                failed = _failure(number, error)
                self._ready.put(lambda: failed)
            else:
                self._ready.put(lambda: _sure(_safely(number, lambda: then(result)), number))

        self._at_work += 1
        threading.Thread(target=run, name="rollpool-load", daemon=True).start()

    def _update(self, order: UpdateWeights) -> Reply | None:
        if self._updating:
            raise Refused("another update of the weights is under way")
        self._updating = True

        def stage() -> Staged:
            try:
                return self._stage(order)
            except BaseException:
                self._updating = False
                raise

        def switch(staged: Staged) -> Reply:
            try:
                return self._switch(order, staged)
            finally:
                self._updating = False

        self._beside(order.number, stage, switch)
        return None

    def _stage(self, order: UpdateWeights) -> Staged:
        """Load and compare, while serving goes on."""
        if (deposited := self._deposits.pop(order.model_path, None)) is not None:
            return deposited
        scheduler = self._scheduler

        def config() -> Any:
            return weights.config_of(type(scheduler.model_config), scheduler.server_args, order.model_path)

        check_checkpoint(order.model_path)
        weights.check_config(scheduler.model_config, config())
        if order.staging == "device" or (order.staging == "auto" and weights.fits_beside(self._runner)):
            try:
                return weights.StagedOnDevice(self._runner, config())
            except Refused as error:
                if order.staging == "device" or not weights.is_out_of_memory(error):
                    raise
        return weights.StagedByLeaf(self._runner, config)

    def _switch(self, order: UpdateWeights, staged: Staged) -> Reply:
        """Change over between two batches."""
        began = time.perf_counter()
        requests = boundary.stop(self._scheduler)
        try:
            staged.put()
            if not boundary.probe(self._scheduler):
                raise Refused(f"{order.model_path} gives logits that are not finite")
        except Exception as error:
            self._put_back(staged)
            reply = _failure(order.number, error)
        else:
            waiting = boundary.unfinished(self._scheduler)
            self._marks.change(
                order.weight_version,
                [(rid, len(each.output_ids)) for each in waiting for rid in boundary.rids_of(each)],
            )
            self._scheduler.server_args.model_path = order.model_path
            reply = Reply(order.number, True, f"serving {order.model_path} as version {order.weight_version}")
        stalled = time.perf_counter() - began
        staged.forget()
        return dataclasses.replace(reply, requests=len(requests), stall_seconds=stalled)

    def _put_back(self, staged: Staged) -> None:
        try:
            staged.put_back()
            # Once more: numbers that are not finite, left in the cache, would spoil what is read beside them.
            boundary.probe(self._scheduler)
        except Exception as error:
            raise NothingServes("the old weights cannot be put back") from error

    def _load_adapter(self, order: LoadAdapter) -> Reply | None:
        adapters = self._lora()
        adapters.reserve(order.lora_id)

        def read() -> Any:
            try:
                return adapters.read(order.lora_id, order.lora_name, order.lora_path)
            except BaseException:
                adapters.give_up(order.lora_id)
                raise

        def put(adapter: Any) -> Reply:
            try:
                adapters.put(order.lora_id, adapter)
            except BaseException:
                adapters.give_up(order.lora_id)
                raise
            return Reply(order.number, True, f"loaded {order.lora_name} from {order.lora_path}")

        self._beside(order.number, read, put)
        return None

    def _unload_adapter(self, order: UnloadAdapter) -> Reply:
        self._lora().unload(order.lora_id, order.lora_name)
        return Reply(order.number, True, f"unloaded {order.lora_name}")

    def _lora(self) -> Adapters:
        if self._adapters is None:
            raise Refused("this engine was launched without --enable-lora")
        return self._adapters


class _SpansAttached:
    """The scheduler's socket to the detokenizer, which sends with each output what made its tokens."""

    def __init__(self, socket: Any, marks: VersionMarks) -> None:
        self._socket = socket
        self._marks = marks

    def send_pyobj(self, output: Any, *args: Any, **options: Any) -> Any:
        """Send an output."""
        if hasattr(output, "completion_tokens"):
            spans = self._marks.of_outputs(output.rids, output.completion_tokens, output.finished_reasons)
            setattr(output, SPANS, spans)
        return self._socket.send_pyobj(output, *args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


def _safely(number: int, work: Callable[[], Reply | None]) -> Reply | None:
    try:
        return work()
    except NothingServes:
        raise
    except Exception as error:
        return _failure(number, error)


def _sure(reply: Reply | None, number: int) -> Reply:
    return reply or Reply(number, False, "no answer")


def _failure(number: int, error: BaseException) -> Reply:
    """The reply to an order that failed; a fault that nobody foresaw is printed whole."""
    if isinstance(error, Refused):
        return Reply(number, False, str(error), restart_may_help=error.restart_may_help)
    print("rollpool: an order to the engine failed:", file=sys.stderr)
    traceback.print_exception(error)
    return Reply(number, False, f"{type(error).__name__}: {error}", restart_may_help=True)
