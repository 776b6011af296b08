"""Tokens, time series, speech and tables: transformers, pytorch-tabnet."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from pytorch_tabnet.tab_network import TabNet
from torch import Tensor, nn
from zoo.measure import Architecture

N, C, LENGTH, WORDS = 8, 3, 6, 20
SIZES = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32, "max_position_embeddings": 16, "num_labels": C, "pad_token_id": 0}  # fmt: skip


def logits(model: nn.Module, batch: dict[str, Tensor], field: str = "logits") -> tuple[Tensor, Tensor]:
    """Of a Hugging Face batch, which holds its labels."""
    return model(**{key: t for key, t in batch.items() if key != "labels"})[field], batch["labels"]


def first_token(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    output, labels = logits(model, batch)
    return output[:, 0], labels


def words() -> dict[str, Tensor]:
    """Sentences of unequal length."""
    mask = torch.arange(LENGTH) < torch.randint(LENGTH - 2, LENGTH + 1, (N, 1))
    ids = torch.randint(1, WORDS, (N, LENGTH)) * mask
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.randint(C, (N,))}


def inputs() -> dict[str, Tensor]:
    return {"inputs": torch.randint(1, WORDS, (N, LENGTH)), "labels": torch.randint(C, (N,))}


def pixels(size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(N, 3, size, size), "labels": torch.randint(C, (N,))}


def series() -> dict[str, Tensor]:
    return {"past_values": torch.randn(N, 16, 2), "labels": torch.randint(C, (N,))}


def speech() -> dict[str, Tensor]:
    return {"input_values": torch.randn(N, 400), "labels": torch.randint(C, (N,))}


def maps() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.randint(C, (2, 8, 8))}


def net(name: str, kind: str, batch: Callable, forward: Callable = logits, **options: Any) -> Architecture:
    """A model of transformers, e.g. ``"BertForSequenceClassification"``, from a configuration."""
    config = getattr(transformers, kind.partition("For")[0] + "Config")

    def build() -> nn.Module:
        return getattr(transformers, kind)(config(**options))

    return Architecture(name, "transformers", build, batch, forward)


def rows() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 5), torch.randint(C, (N,))


def tabnet() -> nn.Module:
    return TabNet(5, C, n_d=4, n_a=4, n_steps=2, virtual_batch_size=4, group_attention_matrix=torch.eye(5))


def some(*names: str) -> dict[str, Any]:
    return {name: SIZES[name] for name in names}


ENCODER = some("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_labels")
SPEECH = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
          "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8,
          "apply_spec_augment": False}  # fmt: skip

ARCHITECTURES = [
    net("BERT", "BertForSequenceClassification", words, **SIZES),
    net("ALBERT", "AlbertForSequenceClassification", words, embedding_size=8, **SIZES),
    net("MPNet", "MPNetForSequenceClassification", words, **SIZES),
    net("DeBERTa", "DebertaV2ForSequenceClassification", words, relative_attention=True, position_buckets=4,
        pos_att_type=["p2c", "c2p"], **SIZES),
    net("GPT-2", "GPT2ForSequenceClassification", words, n_positions=16, n_embd=16, n_layer=2, n_head=2,
        bos_token_id=1, eos_token_id=2, **some("vocab_size", "num_labels", "pad_token_id")),
    net("Llama", "LlamaForSequenceClassification", words, num_key_value_heads=1, **SIZES),
    net("T5 encoder", "T5ForTokenClassification", words, first_token, d_model=16, d_kv=8, d_ff=16,
        num_layers=2, num_heads=2, **some("vocab_size", "num_labels", "pad_token_id")),
    net("XLNet", "XLNetForSequenceClassification", words, d_model=16, n_layer=2, n_head=2, d_inner=16,
        **some("vocab_size", "num_labels")),
    net("Perceiver", "PerceiverForSequenceClassification", inputs, num_latents=4, d_latents=16, d_model=16,
        num_blocks=1, num_self_attends_per_block=1, num_self_attention_heads=2, num_cross_attention_heads=2,
        **some("vocab_size", "max_position_embeddings", "num_labels")),
    net("DINOv2", "Dinov2ForImageClassification", pixels, image_size=32, patch_size=8, mlp_ratio=2, **ENCODER),
    net("WavLM", "WavLMForSequenceClassification", speech, **SPEECH, **ENCODER),
    net("HF ViT", "ViTForImageClassification", pixels, image_size=32, patch_size=8, **ENCODER),
    net("CvT", "CvtForImageClassification", pixels, embed_dim=[8, 8, 8], num_heads=[1, 2, 2], depth=[1, 2, 3],
        num_labels=C),
    net("SegFormer", "SegformerForSemanticSegmentation", maps, hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=8, mlp_ratios=[2, 2, 2, 2], num_labels=C),
    net("PatchTST", "PatchTSTForClassification", series, partial(logits, field="prediction_logits"),
        context_length=16, num_input_channels=2, patch_length=4, patch_stride=4, d_model=8, num_attention_heads=2,
        num_hidden_layers=2, ffn_dim=16, num_targets=C),
    net("PatchTSMixer", "PatchTSMixerForTimeSeriesClassification", series,
        partial(logits, field="prediction_outputs"), context_length=16, num_input_channels=2, patch_length=4,
        patch_stride=4, d_model=8, num_layers=2, norm_mlp="BatchNorm", num_targets=C),
    net("Wav2Vec2-Conformer", "Wav2Vec2ConformerForSequenceClassification", speech, conv_depthwise_kernel_size=3,
        position_embeddings_type="relative", **SPEECH, **ENCODER),
    Architecture("TabNet", "pytorch_tabnet", tabnet, rows, lambda model, batch: (model(batch[0])[0], batch[1])),
]  # fmt: skip
