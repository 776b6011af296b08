"""Images: timm, torchvision, segmentation-models-pytorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from timm.layers import GatedMlp, GroupNormAct
from timm.models import byobnet, cspnet, ghostnet, maxxvit, metaformer, mlp_mixer, nfnet, regnet, resnetv2, vgg
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.convmixer import ConvMixer
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from torch import Tensor, nn
from zoo.measure import Architecture

N, C = 8, 3
LABELLED = 8  # every eighth pixel, in either direction


def images(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(N, 3, size, size), torch.randint(C, (N,))


def maps() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 32, 32), torch.randint(C, (4, 32 // LABELLED, 32 // LABELLED))


def sparse(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return model(batch[0])[..., ::LABELLED, ::LABELLED], batch[1]


def net(name: str, make: str | Callable, size: int = 32, library: str = "timm", **options: Any) -> Architecture:
    """``make(num_classes=..., **options)`` on square images; a string is timm's name."""
    build = partial(timm.create_model, make) if isinstance(make, str) else make
    return Architecture(name, library, partial(build, num_classes=C, **options), partial(images, size))


def mobile(make: type[nn.Module], *stages: str, **options: Any) -> partial:
    """Stages in timm's language of blocks."""
    blocks = decode_arch_def([stage.split() for stage in stages])
    return partial(make, block_args=blocks, stem_size=8, num_features=16, **options)


def byob(name: str, *stages: dict[str, Any], stem: str = "3x3", **options: Any) -> Architecture:
    """Blocks of timm's "bring your own"."""
    kinds = tuple(byobnet.ByoBlockCfg(**{"d": 1, "c": 8, "s": 2, "gs": 0, "br": 1.0} | stage) for stage in stages)
    fixed = "img_size" in options
    cfg = byobnet.ByoModelCfg(kinds, stem_chs=8, stem_pool="", stem_type=stem, fixed_input_size=fixed)
    return net(name, byobnet.ByobNet, cfg=cfg, **options)


def segmentation(name: str, make: Callable, **options: Any) -> Architecture:
    encoder = dict(encoder_name="tu-resnet18", encoder_weights=None, encoder_depth=3, classes=C, **NARROW)
    return Architecture(name, "segmentation_models_pytorch", partial(make, **(encoder | options)), maps, sparse)


NARROW = {"layers": (1, 1, 1, 1), "channels": (4, 4, 8, 8), "stem_width": 4}
FOUR = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
HIERARCHY = {"embed_dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2)}
WINDOWS = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2)}
MIXER = {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 16, "mlp_ratio": 2}
DROPPED = {"drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.1}
BASIC = {"type": "basic"}
TOKENS = {"patch_size": 2, "transformer_depth": 1}

CONVOLUTIONS = [
    net("ResNet", "resnet18", drop_rate=0.1, **NARROW),
    net("ResNet-D with bottlenecks", "resnet50d", drop_path_rate=0.1, base_width=32, **NARROW),
    net("ResNeXt", "resnext50_32x4d", **NARROW | {"cardinality": 2, "base_width": 32}),
    net("SE-ResNet", "seresnet18", **NARROW),
    net("ECA-ResNet", "ecaresnet26t", **NARROW),
    net("Res2Net", "res2net50_26w_4s", base_width=16, **NARROW),
    net("ResNeSt", "resnest14d", channels=(8, 8, 8, 8), stem_width=4, base_width=32),
    net("SKNet", "skresnet18", **NARROW),
    net("ResNetV2", "resnetv2_50", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16), stem_chs=8),
    net("RegNet-Y", regnet.RegNet, drop_path_rate=0.1,
        cfg=regnet.RegNetCfg(depth=5, w0=8, wa=12, wm=2, group_size=8, se_ratio=0.25, stem_width=8)),
    net("DenseNet", "densenet121", growth_rate=4, block_config=(2, 2), drop_rate=0.1),
    net("VGG", vgg.VGG, cfg=[8, "M", 8, "M", 16, "M"], norm_layer=nn.BatchNorm2d, mlp_ratio=0.01, drop_rate=0.1),
    net("CSPNet", cspnet.CspNet, cfg=cspnet.CspModelCfg(cspnet.CspStemCfg(out_chs=8), cspnet.CspStagesCfg(
        depth=(1, 1), out_chs=(8, 16), stride=2, expand_ratio=2.0, bottle_ratio=0.5))),
    net("EfficientNet", mobile(EfficientNet, "ds_r1_k3_s1_e1_c8_se0.25", "ir_r1_k3_s2_e3_c8_se0.25",
        "ir_r1_k5_s2_e3_c16_se0.25"), drop_rate=0.2, drop_path_rate=0.2),
    net("MobileNetV3", mobile(MobileNetV3, "ds_r1_k3_s1_e1_c8", "ir_r1_k3_s2_e3_c8_se0.25", "cn_r1_k1_s1_c16",
        act_layer=nn.Hardswish), drop_rate=0.2),
    net("MobileNetV4", mobile(MobileNetV3, "uir_r1_a3_k3_s2_e2_c8",
        "mqa_r1_k3_h2_s1_v2_d8_c8 uir_r1_a0_k3_s1_e2_c8", "cn_r1_k1_s1_c16"), layer_scale_init_value=1e-2),
    net("MixNet", mobile(EfficientNet, "ds_r1_k3_s1_e1_c8", "ir_r1_k3.5_a1.1_p1.1_s2_e4_c8_se0.5_nsw")),
    net("CondConv", mobile(EfficientNet, "ds_r1_k3_s1_e1_c8", "ir_r1_k3_s2_e2_c8_cc2")),
    net("GhostNet", ghostnet.GhostNet, cfgs=[[[3, 16, 16, 0, 1]], [[3, 48, 24, 0.25, 2]]], width=0.25, drop_rate=0.2),
    net("ShuffleNetV2", torchvision.models.ShuffleNetV2, library="torchvision", stages_repeats=[1, 1, 1],
        stages_out_channels=[8, 8, 16, 16, 32]),
    byob("RepVGG", {"type": "rep"}, {"type": "rep"}, stem="rep"),
    byob("MobileOne", *[{"type": "one", "block_kwargs": {"num_conv_branches": 2}}] * 2, stem="one"),
    net("RepViT", "repvit_m0_9", embed_dim=(8, 8), depth=(1, 1)),
    net("ConvMixer", ConvMixer, dim=16, depth=2, kernel_size=5, patch_size=4),
    net("ConvNeXt", "convnext_atto", ls_init_value=1e-2, drop_path_rate=0.1, **FOUR),
    net("ConvNeXtV2", "convnextv2_atto", **FOUR),
    net("BiT (weight-standardised)", resnetv2.ResNetV2, layers=(1, 1), channels=(16, 32), stem_chs=8,
        norm_layer=partial(GroupNormAct, num_groups=4)),
    net("NFNet", nfnet.NormFreeNet, drop_path_rate=0.1, cfg=nfnet.NfCfg(
        (1, 1), (16, 16), stem_chs=8, attn_layer="se", attn_kwargs={"rd_ratio": 0.5}, act_layer="silu")),
]  # fmt: skip
ATTENTION = [
    byob("BoTNet", BASIC, {"type": "self_attn", "c": 16, "br": 0.5, "self_attn_layer": "bottleneck",
         "self_attn_kwargs": {"num_heads": 2}}, img_size=32),
    byob("HaloNet", BASIC, {"type": "self_attn", "c": 16, "s": 1, "br": 0.5, "self_attn_layer": "halo",
         "self_attn_kwargs": {"block_size": 4, "halo_size": 1, "num_heads": 2}}),
    byob("LambdaNet", BASIC, {"type": "self_attn", "c": 16, "br": 0.5, "self_attn_layer": "lambda",
         "self_attn_kwargs": {"r": None, "num_heads": 2}}, img_size=32),
    byob("MobileViT", BASIC, {"type": "mobilevit", "s": 1, "gs": 1, "block_kwargs": {**TOKENS, "transformer_dim": 16,
         "num_heads": 2, "drop_path_rate": 0.1}}),
    byob("MobileViTv2", BASIC, {"type": "mobilevit2", "gs": 1, "block_kwargs": TOKENS}),
    net("LeViT", "levit_128s", img_size=32, embed_dim=(16, 16), depth=(1, 1), num_heads=(2, 2), key_dim=4),
    net("FastViT", "fastvit_t8", 64, layers=(1, 1, 1, 1), embed_dims=(4, 4, 8, 8), mlp_ratios=(1, 1, 1, 1)),
    net("Visformer", "visformer_tiny", img_size=32, init_channels=4, embed_dim=16, depth=(1, 1, 1), num_heads=2,
        group=4),
    net("CoAtNet", maxxvit.MaxxVit, img_size=32, cfg=maxxvit.MaxxVitCfg((8, 16), (1, 1), ("C", "T"), stem_width=8,
        transformer_cfg=maxxvit.MaxxVitTransformerCfg(dim_head=8, rel_pos_type="bias_tf"))),
    net("MaxViT", maxxvit.MaxxVit, img_size=32, cfg=maxxvit.MaxxVitCfg((8, 8), (1, 1), ("M", "M"), stem_width=8,
        transformer_cfg=maxxvit.MaxxVitTransformerCfg(dim_head=8, window_size=4, grid_size=4))),
    net("XCiT", "xcit_nano_12_p8_224", img_size=32, embed_dim=16, depth=1, num_heads=2),
    net("SwiftFormer", "swiftformer_xs", 64, layers=[1, 1, 1, 1], embed_dims=[4, 4, 8, 8], mlp_ratios=2),
    net("TinyViT", "tiny_vit_5m_224", 32, num_heads=(2, 2, 2, 2), embed_dims=(4, 4, 8, 8), depths=(1, 1, 1, 1),
        window_sizes=(2, 2, 2, 2)),
    net("ViT", "vit_tiny_patch16_224", **DROPPED, **VIT),
    net("DeiT III", "deit3_small_patch16_224", drop_path_rate=0.1, **VIT),
    net("CaiT", "cait_xxs24_224", **VIT),
    net("BEiT", "beit_base_patch16_224", init_values=0.1, **VIT),
    net("ViT-relpos", "vit_relpos_small_patch16_224", **VIT),
    net("EVA-02", "eva02_tiny_patch14_224", 28, **VIT | {"img_size": 28, "patch_size": 7}),
    net("Swin", "swin_tiny_patch4_window7_224", **WINDOWS),
    net("SwinV2", "swinv2_tiny_window8_256", **WINDOWS),
    net("Hiera", "hiera_tiny_224", 64, img_size=64, embed_dim=8, stages=(1, 1, 1, 1), drop_path_rate=0.1),
    net("PVTv2", "pvt_v2_b0", 64, mlp_ratios=(2, 2, 2, 2), **HIERARCHY),
    net("Twins-SVT", "twins_svt_small", 64, img_size=64, mlp_ratios=(2, 2, 2, 2), **HIERARCHY),
    net("PoolFormer", metaformer.MetaFormer, layer_scale_init_values=1e-2, **FOUR),
    net("Sequencer2D", "sequencer2d_s", layers=(1, 1, 1, 1), patch_sizes=(4, 2, 1, 1), embed_dims=(8, 8, 8, 8),
        hidden_sizes=(4, 4, 4, 4)),
    net("MLP-Mixer", mlp_mixer.MlpMixer, **MIXER),
    net("ResMLP", mlp_mixer.MlpMixer, block_layer=mlp_mixer.ResBlock, norm_layer=mlp_mixer.Affine, **MIXER),
    net("gMLP", mlp_mixer.MlpMixer, block_layer=mlp_mixer.SpatialGatingBlock, mlp_layer=GatedMlp, **MIXER),
]  # fmt: skip
SEGMENTATION = [
    segmentation("U-Net", smp.Unet, decoder_channels=(8, 8, 8)),
    segmentation("U-Net++", smp.UnetPlusPlus, decoder_channels=(8, 4, 4)),
    segmentation("MA-Net", smp.MAnet, decoder_channels=(8, 8, 8), decoder_pab_channels=4),
    segmentation("Linknet", smp.Linknet),
    segmentation("PSPNet", smp.PSPNet, psp_out_channels=8),
    segmentation("DeepLabV3+", smp.DeepLabV3Plus, encoder_depth=5, decoder_channels=8, decoder_atrous_rates=(1, 2, 3)),
]
ARCHITECTURES = CONVOLUTIONS + ATTENTION + SEGMENTATION
