"""The routers of a mixture of experts in a training step: losses, biases, and what is watched of them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dlm_core.models.moe import route
from dlm_core.models.router_losses import RouterTap, balance_loss, tokens_per_expert, z_loss
from pipeline.pretrain.batches import Batch
from pipeline.pretrain.config import PretrainConfig


@dataclass(frozen=True)
class Globals:
    """What the sums over a step's global batch are divided by."""

    num_tokens: int
    """Tokens of the bound: the denominator of the objective."""
    num_text: int
    """Tokens that are no padding, which routers see."""


class Routers:
    """Taps the routers of a model; make it after ``deepspeed.initialize`` and before anything is compiled."""

    def __init__(self, model: nn.Module, config: PretrainConfig) -> None:
        moe = config.architecture.moe
        assert moe is not None
        self._config, self._moe = config, moe
        self.tap = RouterTap(model)

    def loss_and_sums(self, batch: Batch, totals: Globals) -> tuple[Tensor, Tensor]:
        """Share of a micro batch in the router loss of the global batch, and in its sums [layers, 2 + experts].

        balance * sum_layers balance_sum / groups  +  z * sum_layers z_sum / tokens,  both over the global batch; a
        layer of block diffusion routes the tokens of both halves.  The sums are the two quotients of each layer and the
        tokens of each expert.
        """
        config, moe, losses = self._config, self._moe, self._config.router_loss
        num_rows, seq_len = batch.xt.shape
        num_groups = num_rows // losses.group_seqs * config.grad_accum_steps * config.workers
        device = next(iter(self.tap.logits.values())).device
        is_text, loss, sums = batch.is_text.to(device), torch.zeros((), device=device), []
        for name, flat in self.tap.logits.items():
            logits = flat.view(num_rows, -1, moe.num_experts)
            halves = logits.shape[1] // seq_len
            valid = is_text.repeat(1, halves)
            bias = self.tap.selection_bias(name)
            balance = balance_loss(logits, valid, moe, group_seqs=losses.group_seqs, selection_bias=bias).loss_sum
            z = z_loss(logits, valid).loss_sum
            balance, z = balance / num_groups, z / max(1, totals.num_text * halves)
            loss = loss + losses.balance * balance + losses.z * z
            _, expert_ids = route(flat.detach(), moe, bias)
            load = tokens_per_expert(expert_ids, valid.flatten(), moe.num_experts)
            sums.append(torch.cat([torch.stack([balance.detach(), z.detach()]).double(), load.double()]))
        return loss, torch.stack(sums)

    def move_biases(self, sums: Tensor) -> None:
        """Move every selection bias towards an even load:  bias += bias_rate * sign(mean load - load), by layer.

        ``sums`` are those of ``loss_and_sums`` over the global batch.  Wang et al., arXiv 2408.15664, algorithm 1.
        """
        for name, load in zip(self.tap.logits, sums[:, 2:], strict=True):
            bias = self.tap.selection_bias(name)
            assert bias is not None, "the configuration refuses a bias_rate without one"
            bias += (self._config.router_loss.bias_rate * (load.mean() - load).sign()).to(bias)


def router_metrics(sums: Tensor) -> dict[str, float]:
    """Figures of a step from the sums of its global batch [layers, 2 + experts].

    Means over layers of both losses; the largest and the smallest load of an expert in any layer, relative to an even
    spread; and experts, over all layers, that no token went to.  No token is ever dropped: experts have no capacity.
    """
    losses, load = sums[:, :2].mean(dim=0), sums[:, 2:]
    relative = load / load.mean(dim=1, keepdim=True).clamp(min=1e-9)
    return {
        "router_balance": float(losses[0]),
        "router_z": float(losses[1]),
        "expert_load_max": round(float(relative.max()), 4),
        "expert_load_min": round(float(relative.min()), 4),
        "experts_idle": int((load == 0).sum()),
    }
