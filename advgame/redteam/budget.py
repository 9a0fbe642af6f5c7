"""What a run may spend, and the reasons for which it stops short of its end."""

from __future__ import annotations

from dataclasses import dataclass


class Halt(Exception):
    """The work on a seed stops here and can go on in a later run. Whatever was paid for is on the record."""


class BudgetSpent(Halt):
    """The run's budget of queries or tokens is used up."""


class Stopped(Halt):
    """The user asked the run to stop."""


class QueryFailed(Halt):
    """A model gave no answer within all retries; a later run asks the same again."""


@dataclass
class Budget:
    """Limits over the whole run, all of its attempts together; None is no limit.

    max_queries counts answers of the target. max_tokens counts prompt and completion tokens of every model, as far
    as they are known. A query starts only while there is room, so queries are never exceeded; the token limit can be
    by as much as was in flight when it was reached.
    """

    max_queries: int | None = None
    max_tokens: int | None = None
    queries: int = 0
    tokens: int = 0
    reserved: int = 0
    stopping: bool = False

    def stop(self) -> None:
        """No further query starts; those in flight end."""
        self.stopping = True

    def reserve(self, target: bool) -> None:
        """Room for one query, kept until `settle`. Raises BudgetSpent or Stopped."""
        if self.stopping:
            raise Stopped("stopped by the user")
        if self.max_tokens is not None and self.tokens >= self.max_tokens:
            raise BudgetSpent(f"the budget of {self.max_tokens} tokens is spent")
        if target:
            if self.max_queries is not None and self.queries + self.reserved >= self.max_queries:
                raise BudgetSpent(f"the budget of {self.max_queries} target queries is spent")
            self.reserved += 1

    def settle(self, target: bool) -> None:
        """Gives back what `reserve` kept."""
        self.reserved -= target

    def spend(self, target: bool, tokens: int) -> None:
        """Counts an answer that was paid for, now or in an earlier attempt."""
        self.queries += target
        self.tokens += tokens
