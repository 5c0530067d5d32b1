"""The modules inside somebody else's Lightning project: other loaders, other subclasses, five lines of Python."""

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from helpers.stages import adamw, save_llama, save_reward_model, share_of_letters, trainer
from rlhf_lightning import PPOModule, PromptDataModule, RewardModule, Sampling, SFTModule
from rlhf_lightning.batches import InstructionBatch, PreferenceBatch, PromptBatch


class Numbers(Dataset):
    """Six sequences of ids that count upwards, of 3 to 8 tokens."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.arange(10 + index, 13 + index + index)


def pad(sequences):
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return ids, torch.arange(ids.shape[1]) < lengths.unsqueeze(1)


def instructions(sequences):
    ids, mask = pad(sequences)
    taught = mask.clone()
    taught[:, 0] = False
    return InstructionBatch(ids, mask, taught, torch.arange(len(ids)))


def pairs(sequences):
    chosen, mask = pad(sequences)
    rejected = torch.where(mask, chosen + 100, 0)
    return PreferenceBatch(chosen, mask, rejected, mask, torch.arange(len(chosen)))


def prompts(sequences):
    ids, mask = pad([sequence.flip(0) for sequence in sequences])
    texts = [str(sequence.tolist()) for sequence in sequences]
    return PromptBatch(ids.flip(1), mask.flip(1), texts, torch.arange(len(ids)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


class TheirCallback(pl.Callback):
    """Watches a metric, as an early stopping would."""

    def __init__(self, metric):
        self.metric, self.seen = metric, []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append(trainer.callback_metrics[self.metric].item())


def test_sft_on_a_plain_loader(folder):
    loader = DataLoader(Numbers(), batch_size=6, collate_fn=instructions)
    watch = TheirCallback("train/loss")
    trainer(max_epochs=30, callbacks=[watch]).fit(SFTModule(folder, optimizer=adamw(1e-2)), loader, loader)
    assert watch.seen[-1] < 0.2 < 3 < watch.seen[0]


def test_reward_on_a_plain_loader_is_calibrated_on_a_plain_loader(folder):
    loader = DataLoader(Numbers(), batch_size=4, collate_fn=pairs)
    module, watch = RewardModule(folder, optimizer=adamw(1e-2)), TheirCallback("train/accuracy")
    trainer(max_epochs=15, callbacks=[watch]).fit(module, loader, loader)
    assert watch.seen[-1] == 1
    scores = module.held_out_scores.compute()
    assert len(scores) == 6
    assert module.scalar.calibration.mean == pytest.approx(scores.mean().item())


def test_ppo_on_a_plain_loader(folder, tmp_path):
    loader = DataLoader(Numbers(), batch_size=3, collate_fn=prompts)
    reward = save_reward_model(tmp_path / "reward", folder)
    module = PPOModule(folder, reward, sampling=Sampling(max_new_tokens=4), rollout_batch_size=3, minibatch_size=3)
    watch = TheirCallback("train/score")
    trainer(callbacks=[watch]).fit(module, loader, loader)
    assert len(watch.seen) == 2


def test_ppo_in_five_lines(folder):
    rows = [{"prompt": f"tell me {i}"} for i in range(8)]
    data = PromptDataModule(folder, rows, max_prompt_length=32, rollout_batch_size=4)
    sampling = Sampling(max_new_tokens=8)
    module = PPOModule(folder, share_of_letters, sampling=sampling, rollout_batch_size=4, minibatch_size=4)
    run = trainer(max_steps=2)
    run.fit(module, data)
    assert run.global_step == 2


class TheirSFT(SFTModule):
    """Adds a penalty to the loss and a metric of its own."""

    def loss_sums(self, batch):
        loss, nll = super().loss_sums(batch)
        return loss + 0.1 * self.export_model.lm_head.weight.square().sum(), nll

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.log("theirs", float(batch_idx))


def test_a_stage_can_be_subclassed(folder):
    loader = DataLoader(Numbers(), batch_size=6, collate_fn=instructions)
    run = trainer()
    run.fit(TheirSFT(folder), loader)
    plain = trainer()
    plain.fit(SFTModule(folder), loader)
    assert run.callback_metrics["train/objective"] > plain.callback_metrics["train/objective"]
    assert run.callback_metrics["train/loss"] == plain.callback_metrics["train/loss"]
    assert run.callback_metrics["train/perplexity"] == plain.callback_metrics["train/perplexity"]
    assert run.callback_metrics["theirs"] == 0
