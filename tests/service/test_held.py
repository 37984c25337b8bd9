"""Events that wait: what goes when, and what holds what up."""

from service.exchange import Heard, Said
from service.flow import Flow
from service.gate import WHOLE
from service.held import Held
from service.sse import Event

NONE: frozenset[int] = frozenset()


class Waiting:
    """Events of two choices, by their names."""

    def __init__(self) -> None:
        self.flows = {0: Flow(()), 1: Flow(())}
        self.held = Held(frozenset(self.flows))

    def says(self, name: str, *choices: int) -> None:
        said = tuple(Said(choice, "text", "t", name) for choice in choices)
        for choice, kind, track, text in said:
            self.flows[choice].add(kind, track, text)
        self._add(name, Heard(said, frozenset(choices)))

    def ends(self, name: str, choice: int) -> None:
        self._add(name, Heard((), frozenset({choice}), frozenset({choice})))

    def tells(self, name: str, *choices: int) -> None:
        """Without a text."""
        self._add(name, Heard((), frozenset(choices)))

    def ready(self, released: dict[int, int], dropped: frozenset[int] = NONE) -> list[str]:
        return [one.event.data for one in self.held.ready(released, dropped)]

    def rest(self) -> list[str]:
        return [one.event.data for one in self.held.rest()]

    def _add(self, name: str, heard: Heard) -> None:
        self.held.add(Event(None, name, f"data: {name}\n\n".encode()), heard, self.flows)


def test_what_was_cleared_goes_in_its_order() -> None:
    waiting = Waiting()
    for name in ("aa", "bb", "cc"):
        waiting.says(name, 0)
    assert waiting.ready({0: 3}) == ["aa"]
    assert waiting.ready({0: 6}) == ["bb", "cc"]
    assert waiting.held.size == 0


def test_a_choice_that_waits_holds_no_other_up() -> None:
    waiting = Waiting()
    waiting.says("aa", 0)
    waiting.ends("end", 0)
    waiting.says("bb", 1)
    assert waiting.ready({0: 2, 1: 2}) == ["aa", "bb"]
    assert waiting.ready({0: WHOLE, 1: 2}) == ["end"]


def test_of_one_choice_nothing_overtakes() -> None:
    waiting = Waiting()
    waiting.says("both", 0, 1)
    waiting.says("one", 1)
    assert waiting.ready({1: WHOLE}) == []
    assert waiting.ready({0: WHOLE, 1: WHOLE}) == ["both", "one"]


def test_what_is_of_no_choice_waits_for_all_before_it() -> None:
    waiting = Waiting()
    waiting.says("aa", 0)
    waiting.tells("ping")
    waiting.says("bb", 1)
    assert waiting.ready({1: WHOLE}) == ["bb"]
    assert waiting.ready({0: WHOLE}) == ["aa", "ping"]


def test_what_comes_behind_every_choice_is_for_the_end() -> None:
    waiting = Waiting()
    waiting.ends("end 0", 0)
    waiting.ends("end 1", 1)
    waiting.tells("usage", 0)
    assert waiting.rest() == []
    assert waiting.ready({0: WHOLE, 1: WHOLE}) == ["end 0", "end 1"]
    assert waiting.rest() == ["usage"]


def test_of_a_choice_that_was_dropped_nothing_goes_and_nothing_waits() -> None:
    waiting = Waiting()
    waiting.says("aa", 0)
    waiting.says("both", 0, 1)
    waiting.says("bb", 1)
    assert waiting.ready({1: WHOLE}, frozenset({0})) == ["both", "bb"]
    assert waiting.held.size == 0
