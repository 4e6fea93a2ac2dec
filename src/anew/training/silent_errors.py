"""Find hardware that computes wrongly without an error: equal computations must give equal bits.

    check = GradientCheck(state, loss_of, micro_batches[0], divisor)   # every `check_every` steps
    train_step(loss_of, state, micro_batches, ..., after_first_pass=check.after_first_pass)
    check.refuse_differences()

    refuse_different_ranks(state)                                      # before each save

The first check runs a forward and a backward pass of the step's first micro-batch once more than
the step does. The second compares the weights and the optimizer state of ranks that should have
equal copies. Both compare sums over the bits of each tensor, which any single flipped bit changes;
a sum is computed on the device and is one number, so nothing is copied. What a check finds is
raised on every rank alike, before anything is saved, so the last checkpoint has not been affected
by it.

Not found: an error in a later micro-batch of the step; a bit that flips in the memory of a single
process between two steps, or a wrong update of its weights; a wrong sum that all ranks receive; and
an error that occurs in both passes alike.
"""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from anew.errors import ComputedWrongly, UserError
from anew.training.step import LossFunction, MicroBatch, dropout_seed, release_gradients
from anew.training.train_state import TrainState

SHOWN_TENSORS = 3  # in an error

BitSums = dict[str, int]  # by the name of a tensor


def refuse_inexact_devices(state: TrainState) -> None:
    """Raise UserError if equal computations need not give equal bits on this device."""
    device = state.runtime.device.type
    if device != "cpu" and not state.config.run.deterministic:
        raise UserError(
            f"--check-every compares bits, and on {device} they are equal only with "
            "--deterministic; add it, or leave out --check-every."
        )


class GradientCheck:
    """Compares the loss and the gradients of two passes over the first micro-batch of a step.

    Create it before the step, which runs one pass, give `after_first_pass` to `train_step`, which
    runs the other one, and call `refuse_differences` after the step. Of a sharded model both passes
    are run before the step, because a step gets its gradients only after the last micro-batch, from
    FSDP's exchange.
    """

    def __init__(
        self, state: TrainState, loss_of: LossFunction, micro_batch: MicroBatch, divisor: float
    ) -> None:
        self.state = state
        self.step = state.step + 1  # the number of the step that is about to be taken
        self.passes: list[BitSums] = []
        self.after_first_pass = None if state.is_sharded else self._record
        for _ in range(2 if state.is_sharded else 1):
            self._run_pass(loss_of, micro_batch, divisor)

    def _run_pass(self, loss_of: LossFunction, micro_batch: MicroBatch, divisor: float) -> None:
        """Compute what the first pass of the step computes, record it and drop its gradients."""
        state = self.state
        ids, targets = micro_batch
        if state.buckets is not None:
            state.buckets.start_step()
        if state.config.model.dropout > 0:
            run = state.config.run
            torch.manual_seed(dropout_seed(run.seed, state.step, 0, state.world.rank))
        # Copies of a model are not averaged here, so that the rank with the error is found.
        state.prepare_backward(is_last=state.is_sharded)
        loss = loss_of(ids, targets) / divisor
        state.scaler.scale(loss).backward()
        self._record(loss)
        release_gradients(state)

    def _record(self, loss: Tensor) -> None:
        """Record a pass: its loss, and the gradients that the parameters have now."""
        gradients = [
            (f"the gradient of {name}", parameter.grad)
            for name, parameter in self.state.model.named_parameters()
            if parameter.grad is not None
        ]
        self.passes.append(bit_sums([("the loss", loss), *gradients]))

    def refuse_differences(self) -> None:
        """Raise ComputedWrongly if the two passes differ in any bit on any rank.

        Every rank must call this.
        """
        first, second = self.passes
        changed = [name for name, value in first.items() if second[name] != value]
        found = self.state.world.gather(changed)
        for rank, names in enumerate(found):
            if names:
                # The exchange of a sharded model adds an error of one rank to gradients of others.
                who = "some rank" if self.state.is_sharded else f"rank {rank}"
                raise ComputedWrongly(
                    f"step {self.step:,}: {who} has computed one micro-batch twice, and the "
                    f"results differ in {_listed(names)}. {_advice(self.state)}",
                    step=self.step,
                )


def refuse_different_ranks(state: TrainState) -> None:
    """Raise ComputedWrongly if the ranks' copies of weights or optimizer state differ in any bit.

    Sharded weights have no copies, so they are not compared. Every rank must call this.
    """
    if state.world.size == 1 or state.is_sharded:
        return
    bits = bit_sums([*state.model.named_parameters(), *state.optimizer_state()])
    of_ranks = state.world.gather(bits)
    usual = {name: Counter(sums[name] for sums in of_ranks).most_common(1)[0][0] for name in bits}
    for rank, sums in enumerate(of_ranks):
        names = [name for name in bits if sums[name] != usual[name]]
        if names:
            # Of two ranks, nobody knows which one is right.
            who = f"rank {rank} differs from the others"
            if state.world.size == 2:
                who = "ranks 0 and 1 differ"
            raise ComputedWrongly(
                f"step {state.step:,}: {who} in {_listed(names)}. {_advice(state)}",
                step=state.step,
            )


def bit_sums(named: Iterable[tuple[str, Tensor]]) -> BitSums:
    """Return the sum over the bits of each tensor, read as whole numbers of 32 bits.

    Of a sharded tensor, it is the sum of the part on this rank.
    """
    names = []
    sums = []
    for name, tensor in named:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        bits = local.detach().float().contiguous().view(torch.int32)
        names.append(name)
        sums.append(bits.sum(dtype=torch.int64))
    return dict(zip(names, torch.stack(sums).tolist(), strict=True))


def _listed(names: list[str]) -> str:
    others = len(names) - SHOWN_TENSORS
    first = ", ".join(names[:SHOWN_TENSORS])
    return f"{first} and {others} more tensors" if others > 0 else first


def _advice(state: TrainState) -> str:
    return (
        "A machine of this run computes wrongly. Nothing was saved since the error was noticed. "
        f"The same command continues {state.config.folder} from its last checkpoint; use another "
        "machine if you can."
    )
