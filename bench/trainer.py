"""TRL's GRPOTrainer around transformers' Llama with our weights, for tests and for the bench."""

import contextlib
import copy
import logging
import tempfile
import time
from collections.abc import Callable, Sequence

import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from bench.llama import to_llama
from mini.grpo import Settings, grpo
from mini.model import Transformer
from mini.train import Settings as Training


def grpo_trainer(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    reward: Callable[[list[int], list[int]], float],
    settings: Settings,
    end: int,
    callbacks: Sequence[TrainerCallback] = (),
    **options,
) -> trl.GRPOTrainer:
    """The same weights, prompts, rewards, group and lengths; a token is the word "t" and its number."""
    logging.disable(logging.WARNING)
    words = {f"t{i}": i for i in range(model.config.vocab_size)}
    lexicon = Tokenizer(models.WordLevel(words, unk_token="t0"))
    lexicon.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = dict(pad_token="t0", unk_token="t0", eos_token=f"t{end}")

    def score(prompts: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
        asked = [[words[word] for word in prompt.split()] for prompt in prompts]
        return [reward(prompt, answer) for prompt, answer in zip(asked, completion_ids, strict=True)]

    return trl.GRPOTrainer(
        to_llama(model),
        reward_funcs=score,
        args=trl.GRPOConfig(
            **dict(
                output_dir=tempfile.mkdtemp(),
                use_cpu=True,
                bf16=False,
                report_to=[],
                disable_tqdm=True,
                save_strategy="no",
                logging_strategy="no",
                activation_checkpointing=False,  # TRL's default saves memory at the price of time
                num_generations=settings.G,
                max_completion_length=settings.max_new_tokens,
                temperature=settings.temperature,
            )
            | options
        ),
        train_dataset=Dataset.from_list([{"prompt": " ".join(f"t{i}" for i in p)} for p in prompts]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=lexicon, **named),
        callbacks=list(callbacks),
    )


def grpo_steps(
    model: Transformer, prompts: Sequence[Sequence[int]], new: int, ends: bool, rounds: int
) -> tuple[list[float], list[float], float]:
    """Seconds of whole GRPO steps, ours and TRL's in turn after one warm-up, and the mean length of our answers.

    Groups of 8, one update on each rollout. Token 1 ends an answer, or with ends=False all are as long as allowed.
    TRL takes 64 answers at a time through the model, the fastest of 16, 32, 64, 128 and 256 where this was written.
    """
    ours, theirs, lengths = [], [], []
    mine, settings, rows = copy.deepcopy(model), Settings(G=8, max_new_tokens=new), 8 * len(prompts)
    steps = Training(steps=1, lr=1e-4, matrix_lr=0.0, warmup=1)

    def reward(prompt: list[int], answer: list[int]) -> float:
        return answer.count(5) / len(answer)

    class InTurn(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            theirs.append(time.perf_counter() - self.start)
            start, end = time.perf_counter(), 1 if ends else -1
            history = grpo(
                mine, lambda _: prompts, reward, settings, steps, end=end, seed=len(ours), progress=False
            )
            ours.append(time.perf_counter() - start)
            lengths.append(history[0]["length"])

    options = dict(per_device_train_batch_size=64, gradient_accumulation_steps=rows // 64, learning_rate=1e-4)
    options |= dict(max_steps=rounds + 1, shuffle_dataset=False)
    if not ends:
        options |= dict(generation_kwargs=dict(min_new_tokens=new))
    trainer = grpo_trainer(model, prompts, reward, settings, 1, [InTurn()], **options)
    with contextlib.redirect_stdout(None):  # it prints its log at the end
        trainer.train()
    return ours[1:], theirs[1:], sum(lengths) / len(lengths)
