"""Stopping a run on request: SIGTERM and Ctrl-C end it after a whole step, with a checkpoint."""

from typing import Any

from transformers import TrainerCallback, TrainingArguments

from cdistill.runtime.signals import StopRequest


class StopCallback(TrainerCallback):
    """Has Trainer save and stop after the step in which a process received a signal; ``signal`` then says which."""

    def __init__(self, request: StopRequest) -> None:
        self.request, self.signal = request, 0

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """All processes learn of the signal in the same step. After the last step there is nothing to stop."""
        number = self.request.agreed()
        if number and state.global_step < state.max_steps:
            self.signal = number
            control.should_save = control.should_training_stop = True
