"""Networks of timm, by name."""

from functools import partial
from typing import Any

from torch import nn

from benchmarks.zoo.inputs import images
from benchmarks.zoo.network import ZooNetwork

CONVOLUTIONAL = """
    convmixer_768_32 convnext_atto convnextv2_atto cs3darknet_s cspdarknet53 densenet121 densenetblur121d dla34 dla46_c dpn48b
    ecaresnet26t efficientnet_b0_gn efficientnet_cc_b0_4e efficientnet_es efficientnet_lite0 ese_vovnet19b_dw ese_vovnet39b
    fasternet_t0 fbnetc_100 fbnetv3_b gernet_s ghostnet_100 ghostnetv2_100 hardcorenas_a hgnetv2_b0 hrnet_w18_small
    inception_next_atto inception_v4 lcnet_050 legacy_seresnet18 mambaout_femto mixnet_s mnasnet_050 mobilenetv2_050
    mobilenetv3_small_050 mobilenetv4_conv_small mobileone_s0 nf_regnet_b0 nf_resnet26 poolformer_s12 rdnet_tiny regnetx_002
    regnety_002 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_14w_8s resnest14d resnet18 resnet26d resnet50_gn resnetblur50
    resnetv2_50 resnetv2_50x1_bit rexnet_100 selecsls42 seresnet18 skresnet18 spnasnet_100 starnet_s1 tf_efficientnet_b0 tinynet_e
    xception41
"""
"""Convolutional networks, with images of 96 x 96 pixels."""

Case = tuple[int, dict[str, Any]]


def any_size(size: int, **arguments: Any) -> Case:
    """Return the image size for a network that takes any size (or only its default), and constructor arguments that reduce it."""
    return size, arguments


def of_size(size: int, **arguments: Any) -> Case:
    """Return the same for a network whose constructor takes the image size."""
    return size, {"img_size": size, **arguments}


OTHERS: dict[str, Case] = {
    "beit_base_patch16_224": of_size(64, embed_dim=192, num_heads=3, depth=3),
    "beitv2_base_patch16_224": of_size(64, embed_dim=192, num_heads=3, depth=3),
    "botnet26t_256": of_size(128),
    "caformer_s18": any_size(96),
    "cait_xxs24_224": of_size(64, depth=3),
    "coat_lite_tiny": any_size(224),
    "coatnet_0_rw_224": of_size(96),
    "convformer_s18": any_size(96),
    "convit_tiny": any_size(224, depth=3),
    "crossvit_tiny_240": any_size(240),
    "davit_tiny": any_size(96),
    "deit3_small_patch16_224": of_size(64, depth=3),
    "deit_tiny_patch16_224": of_size(64, depth=3),
    "edgenext_xx_small": any_size(96),
    "efficientformer_l1": any_size(224),
    "efficientformerv2_s0": of_size(224),
    "efficientvit_b0": any_size(96),
    "efficientvit_m0": any_size(224),
    "eva02_tiny_patch14_224": of_size(56, depth=3),
    "fastvit_t8": any_size(96),
    "focalnet_tiny_srf": any_size(96),
    "gcvit_xxtiny": of_size(224),
    "gmlp_ti16_224": of_size(64),
    "halonet26t": any_size(256),
    "hiera_tiny_224": of_size(224),
    "lambda_resnet26t": of_size(128),
    "levit_128": of_size(224),
    "maxxvit_rmlp_nano_rw_256": of_size(64),
    "mixer_s32_224": of_size(96),
    "mobilenetv4_hybrid_medium": any_size(96),
    "mobilevit_xxs": any_size(96),
    "mobilevitv2_050": any_size(96),
    "mvitv2_tiny": of_size(64),
    "nest_tiny": of_size(224),
    "nextvit_small": any_size(96),
    "pit_ti_224": of_size(224),
    "pvt_v2_b0": any_size(64),
    "resmlp_12_224": of_size(64),
    "sequencer2d_s": of_size(56),
    "shvit_s1": any_size(128),
    "swiftformer_xs": any_size(96),
    "swin_tiny_patch4_window7_224": of_size(112, depths=(1, 1, 2, 1)),
    "swinv2_cr_tiny_ns_224": of_size(112, depths=(1, 1, 2, 1)),
    "tiny_vit_5m_224": any_size(224),
    "tnt_s_legacy_patch16_224": of_size(64, depth=3),
    "twins_pcpvt_small": of_size(64),
    "visformer_tiny": of_size(224),
    "vit_base_patch16_siglip_224": of_size(64, embed_dim=192, num_heads=3, depth=3),
    "vit_relpos_small_patch16_224": of_size(64, depth=3),
    "vit_tiny_patch16_224": of_size(64, depth=3),
    "vitamin_small_224": of_size(64),
    "volo_d1_224": of_size(64),
    "xcit_nano_12_p16_224": of_size(64),
}
"""Networks with attention or mixing."""


def build(name: str, **arguments: Any) -> nn.Module:
    """Create the network with random weights."""
    import timm

    return timm.create_model(name, pretrained=False, **arguments).eval()


NETWORKS: dict[str, ZooNetwork] = {name: ZooNetwork(partial(build, name), images(96)) for name in CONVOLUTIONAL.split()} | {
    name: ZooNetwork(partial(build, name, **arguments), images(size)) for name, (size, arguments) in OTHERS.items()
}
