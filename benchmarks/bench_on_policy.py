"""What a step of on-policy distillation costs on the CPU, ours and that of TRL's GKDTrainer, on one pair of language models.

`pytest benchmarks/bench_on_policy.py --benchmark-json benchmarks/results/on_policy.json`, half a minute on a free core.
A step generates as many tokens for every prompt, runs both models over them, and makes the gradients of the generalised
Jensen-Shannon divergence; the optimizer is left out. Greedy replies and the loss on the same replies are compared first; then
all ways take turns.
"""

import copy
import statistics
import time

import pytest
import torch
from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl.experimental.gkd import GKDConfig, GKDTrainer

from cdistill.builtin.dataset import build_tokenizer
from cdistill.choices import KDConfig, OnPolicyConfig
from cdistill.train.model import DistillationModel
from cdistill.train.rollout import Rollouts
from cdistill.train.terms import Settings, configured

pytestmark = pytest.mark.long

VOCABULARY, SAMPLES, PROMPT, NEW, ROUNDS = 8192, 8, 64, 48, 9
GIVEN, OURS, TRL = "given answers", "ours", "TRL"


def model(width: int, layers: int, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=1,
    )
    return Qwen2ForCausalLM(config)


class Pair:
    """A student and a teacher, a batch with answers, and both projects' steps."""

    def __init__(self, folder: str) -> None:
        self.student, self.teacher = model(192, 4, 1), model(384, 6, 2).eval()
        ids = torch.randint(10, VOCABULARY, (SAMPLES, PROMPT + NEW), generator=torch.Generator().manual_seed(3))
        labels = ids.clone()
        labels[:, :PROMPT] = -100
        self.batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
        self.no_answers = {"sampled": torch.ones_like(ids, dtype=torch.bool)}  # as in GKD: no cross-entropy
        kd = KDConfig(divergence="jsd", beta=0.5)
        self.losses = DistillationModel(
            self.student, configured(("ar", "kd"), Settings(kd)), teacher=copy.deepcopy(self.teacher)
        )
        self.losses.train()
        self.rollouts = {
            temperature: self._rollouts(OnPolicyConfig(on_policy=1.0, temperature=temperature, max_new_tokens=NEW))
            for temperature in (0.0, 1.0)
        }
        self.trainer = self._trainer(folder)

    def _rollouts(self, config: OnPolicyConfig) -> Rollouts:
        made = Rollouts(self.student, build_tokenizer(), config, seed=0)
        made.stops, made.allowed = [], torch.arange(VOCABULARY)  # every reply has NEW tokens
        return made

    def _trainer(self, folder: str) -> GKDTrainer:
        args = GKDConfig(
            folder,
            use_cpu=True,
            bf16=False,
            report_to="none",
            per_device_train_batch_size=SAMPLES,
            lmbda=1.0,
            beta=0.5,
            temperature=1.0,
            max_new_tokens=NEW,
            gradient_checkpointing=False,
        )
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
        rows = Dataset.from_list([{"messages": messages}] * SAMPLES)
        trainer = GKDTrainer(self.student, self.teacher, args, train_dataset=rows, processing_class=build_tokenizer())
        trainer.generation_config.eos_token_id = None
        trainer.generation_config.top_k = 0
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    def prompts(self) -> dict[str, torch.Tensor]:
        whole, prompt = self.batch, self.batch["input_ids"][:, :PROMPT]
        return dict(whole) | {"prompts": prompt, "prompt_attention_mask": torch.ones_like(prompt)}

    def mean(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Our loss on a batch."""
        return self.losses(**batch | self.no_answers)["kd"] / (batch["labels"] != -100).sum()

    def step(self, way: str, number: int) -> None:
        """Replies, losses, gradients."""
        self.student.zero_grad()
        if way == TRL:
            self.trainer.training_step(self.trainer.model, self.prompts())
            return
        batch = self.batch if way == GIVEN else self.rollouts[1.0](self.batch, number * SAMPLES)
        self.mean(batch).backward()


def check(pair: Pair) -> None:
    """Greedy replies are the same tokens, and the losses of both on them the same number."""
    made = pair.rollouts[0.0](pair.batch, 0)
    config = copy.deepcopy(pair.trainer.generation_config)
    config.do_sample, config.temperature, config.top_k = False, None, None
    pair.student.eval()
    ids, mask, labels = pair.trainer.generate_on_policy_outputs(pair.student, pair.prompts(), config)
    assert torch.equal(made["input_ids"], ids) and torch.equal(made["labels"], labels)
    with torch.no_grad():
        theirs = pair.trainer.compute_loss(pair.student, {"input_ids": ids, "attention_mask": mask, "labels": labels})
        torch.testing.assert_close(pair.mean(made), theirs, rtol=1e-4, atol=1e-6)
    pair.student.train()


def test_time_of_a_step(benchmark, cpu_environment, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pair = Pair(str(tmp_path))
    check(pair)
    seconds: dict[str, list[float]] = {way: [] for way in (GIVEN, OURS, TRL)}
    for way in seconds:
        pair.step(way, 0)

    def timed(way: str) -> None:
        start = time.perf_counter()
        pair.step(way, len(seconds[way]))
        seconds[way].append(time.perf_counter() - start)

    def others() -> None:
        timed(GIVEN)
        timed(TRL)

    benchmark.pedantic(timed, args=(OURS,), setup=others, rounds=ROUNDS)
    torch.set_num_threads(before)
    median = {way: statistics.median(taken) for way, taken in seconds.items()}
    benchmark.extra_info.update(
        cpu_environment,
        threads=1,
        shape={"samples": SAMPLES, "prompt": PROMPT, "new_tokens": NEW, "vocabulary": VOCABULARY},
        median_s=median,
        times_given={way: taken / median[GIVEN] for way, taken in median.items()},
        times_trl={way: taken / median[TRL] for way, taken in median.items()},
    )
