"""How a simulated engine shares its time among requests: continuous batching; pure, the clock is passed in.

Time is made of decode steps. At the boundary between two steps, the requests that have all their tokens leave, waiting
ones take their slots in the order in which they came, and their prompts are computed, for which everybody waits. In a
step each running request gets one token. Nothing is done for each step: what happens next, and when, is worked out.

Invariants: never more run than there are slots; requests begin in the order in which they came; each that was
submitted ends once, by itself or by an abort.
"""

import heapq
from collections import deque
from dataclasses import dataclass

#: Of a step: how far a time may be before a boundary and still count as on it, so that rounding loses no step.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What takes time."""

    #: Seconds of one decode step with nothing in it.
    step_s: float
    #: Seconds that each running request adds to a step.
    request_s: float = 0.0
    #: Seconds for each token of a prompt.
    prompt_token_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of the batch."""

    key: int
    prompt_tokens: int
    #: How many it will generate, at least one.
    tokens: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that is over."""

    key: int
    #: How many it generated.
    tokens: int
    #: False when it has all that it was to generate.
    aborted: bool = False


class _Sequence:
    """One request on its way."""

    __slots__ = ("began", "done", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        #: Tokens generated before it was last admitted.
        self.done = 0
        #: Step at which it was last admitted.
        self.began = 0


class Batch:
    """The requests of one engine; times are seconds of one clock that never goes back."""

    def __init__(self, slots: int, costs: Costs, now: float = 0.0) -> None:
        self._slots = slots
        self._costs = costs
        #: Time of the boundary at which what runs last changed, in the future while prompts are computed; steps since.
        self._since, self._taken = now, 0
        self._paused = False
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[int, _Sequence] = {}
        #: Step at which each running request has all its tokens, and its key; also of some that run no more.
        self._ends: list[tuple[int, int]] = []
        #: Decode steps so far.
        self.steps = 0
        #: Tokens generated so far.
        self.tokens = 0

    @property
    def running(self) -> tuple[int, ...]:
        """Keys of the requests that run, in the order in which they began."""
        return tuple(self._running)

    @property
    def waiting(self) -> tuple[int, ...]:
        """Keys of the requests that wait, the next one first."""
        return tuple(sequence.request.key for sequence in self._waiting)

    @property
    def paused(self) -> bool:
        """True while nothing moves."""
        return self._paused

    @property
    def kv_tokens(self) -> int:
        """Tokens of the running requests, prompts included."""
        return sum(each.request.prompt_tokens + self._made(each) for each in self._running.values())

    def submit(self, now: float, request: Request) -> None:
        """Put a request at the end of the queue; call `advance` first."""
        self._waiting.append(_Sequence(request))
        if not self._running or self._boundary() >= now:
            self._turn(now)

    def abort(self, now: float, key: int) -> Ended | None:
        """End one request with the tokens it has; None when there is no such request. Call `advance` first."""
        if (sequence := self._running.get(key)) is not None:
            made, at = self._made(sequence), self._boundary()
            del self._running[key]
            self._turn(at if self._running else now)
            return Ended(key, made, aborted=True)
        for sequence in self._waiting:
            if sequence.request.key == key:
                self._waiting.remove(sequence)
                return Ended(key, sequence.done, aborted=True)
        return None

    def advance(self, now: float) -> list[Ended]:
        """Let time pass until `now`; what ended meanwhile, in order."""
        ended: list[Ended] = []
        while self._running and not self._paused:
            ahead = self._steps_ahead()
            passed = int((now - self._since) / self._step_s() + _ROUNDING) - self._taken
            taken = max(0, min(passed, ahead))
            self._taken += taken
            self.steps += taken
            self.tokens += taken * len(self._running)
            if taken < ahead:
                break
            at = self._boundary()
            ended += self._leave()
            self._turn(at)
        return ended

    def next_event(self) -> float | None:
        """When `advance` will next have something to do; None: not before something is submitted."""
        if not self._running or self._paused:
            return None
        return self._since + (self._taken + self._steps_ahead()) * self._step_s()

    def pause(self, *, retract: bool = False) -> None:
        """Stand still; `retract` puts what runs back into the queue, first, with its tokens. Call `advance` first."""
        self._paused = True
        if retract:
            for sequence in reversed(self._running.values()):
                sequence.done = self._made(sequence)
                self._waiting.appendleft(sequence)
            self._running.clear()
            self._ends.clear()

    def retract(self, now: float, stall_s: float) -> dict[int, int]:
        """Put what runs back into the queue, first, stand for a while, and go on; call `advance` first.

        Returns:
            The tokens that each request has.
        """
        paused = self._paused
        self.pause(retract=True)
        made = {sequence.request.key: sequence.done for sequence in self._waiting}
        if not paused:
            self.resume(now + stall_s)
        return made

    def resume(self, now: float) -> None:
        """Go on."""
        if self._paused:
            self._paused = False
            self._since = now
            self._turn(now)

    def _step_s(self) -> float:
        return self._costs.step_s + self._costs.request_s * len(self._running)

    def _boundary(self) -> float:
        """Time of the last one."""
        return self._since + self._taken * self._step_s()

    def _steps_ahead(self) -> int:
        """Steps until the next boundary at which anything changes; only while something runs."""
        if self._waiting and len(self._running) < self._slots:
            return 1
        while self._ends[0][1] not in self._running:  # aborted
            heapq.heappop(self._ends)
        return self._ends[0][0] - self.steps

    def _made(self, sequence: _Sequence) -> int:
        """Tokens of one that runs."""
        return sequence.done + self.steps - sequence.began

    def _leave(self) -> list[Ended]:
        ended = []
        while self._ends and self._ends[0][0] <= self.steps:
            _, key = heapq.heappop(self._ends)
            if (sequence := self._running.pop(key, None)) is not None:
                ended.append(Ended(key, sequence.request.tokens))
        return ended

    def _turn(self, at: float) -> None:
        """Begin to count from a boundary, and give the slots that are free at it to those that wait."""
        if self._paused:
            return
        self._since, self._taken = max(self._since, at), 0
        while self._waiting and len(self._running) < self._slots:
            sequence = self._waiting.popleft()
            sequence.began = self.steps
            request = sequence.request
            self._running[request.key] = sequence
            heapq.heappush(self._ends, (self.steps + request.tokens - sequence.done, request.key))
            self._since += (request.prompt_tokens + sequence.done) * self._costs.prompt_token_s
