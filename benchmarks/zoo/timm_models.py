"""timm: one or more of every family, the smallest variants."""

from __future__ import annotations

from functools import partial

from benchmarks.zoo.entry import Built, Entry, image
from benchmarks.zoo.torchvision_ops import ready

#: ``name`` at 64 x 64 pixels, ``name@N`` at N x N
NAMES = """
    beit_base_patch16_224 beitv2_base_patch16_224 botnet26t_256@256 eca_botnext26ts_256@256 halonet_h1@256
    halonet26t@256 eca_halonext26ts@256 lambda_resnet26t@256 lambda_resnet26rpt_256@256 sebotnet33ts_256@256
    bat_resnext26ts@256 eca_resnext26ts gcresnext26ts gernet_s mobileone_s0 mobileone_s1 regnetz_b16
    regnetz_c16_evos repvgg_a0 repvgg_b1g4 repvgg_d2se resnet32ts resnet51q resnext26ts resnet50_mlp
    seresnext26ts cait_xxs24_224 coat_lite_tiny@224 coat_tiny@224 convit_tiny convmixer_768_32
    convnext_zepto_rms convnext_zepto_rms_ols convnext_atto convnext_atto_ols convnext_tiny_hnf
    convnextv2_atto cpubone_nano crossvit_tiny_240@240 crossvit_9_dagger_240@240 csatv2@512
    cs3darknet_focus_s cs3darknet_s cs3sedarknet_l cs3se_edgenet_x cspresnet50 cspresnext50 cspdarknet53
    darknet53 darknetaa53 sedarknet21 cspnext_tiny davit_tiny deit_tiny_patch16_224
    deit_tiny_distilled_patch16_224 deit3_small_patch16_224 densenet121 densenetblur121d dla34 dla46_c
    dla46x_c dla60_res2net dpn48b dpn68b edgenext_xx_small edgenext_small_rw efficientformer_l1@224
    efficientformerv2_s0@224 efficientnet_b0 efficientnet_b0_gn efficientnet_b0_g16_evos
    efficientnet_blur_b0 efficientnet_cc_b0_4e efficientnet_es efficientnet_lite0 efficientnet_x_b3
    efficientnetv2_rw_t gc_efficientnetv2_rw_t tf_efficientnet_b0 fbnetc_100 mixnet_s tf_mixnet_s
    mnasnet_small mobilenet_edgetpu_v2_xs mobilenetv1_100 mobilenetv2_035 mobilenetv2_110d semnasnet_075
    spnasnet_100 tinynet_e efficientvim_m1 efficientvim_m1_dist efficientvit_b0 efficientvit_l1
    efficientvit_m0@224 eva02_tiny_patch14_224@56 fasternet_t0 fastvit_t8 fastvit_sa12 fastvit_mci0
    focalnet_tiny_srf gcvit_xxtiny@224 ghostnet_050 ghostnetv2_100 ghostnetv3_050 hardcorenas_a hgnet_tiny
    hgnetv2_b0 hiera_tiny_224@224 hieradet_small@256 hrnet_w18_small hrnet_w18_ssld iformer_t
    inception_next_atto inception_resnet_v2@128 inception_v3@128 inception_v4@128 lcnetv2_small
    levit_128s@224 levit_conv_128s@224 levit_256d@224 lowformer_b0 mambaout_femto coatnet_pico_rw_224@224
    coatnet_nano_cc_224@224 coatnet_rmlp_nano_rw_224@224 coatnext_nano_rw_224@224 maxvit_pico_rw_256@256
    maxvit_rmlp_pico_rw_256@256 maxxvit_rmlp_nano_rw_256@256 maxxvitv2_nano_rw_256@256 caformer_s18
    convformer_s18 poolformer_s12 poolformerv2_s12 gmlp_ti16_224 gmixer_12_224 mixer_s32_224 resmlp_12_224
    mobilenetv3_small_050 lcnet_035 fbnetv3_b mobilenetv4_conv_small_035 mobilenetv4_conv_aa_medium
    mobilenetv4_hybrid_medium_075 mobilenetv5_base@256 mobilevit_xxs mobilevitv2_050 mvitv2_tiny@224
    naflexvit_base_patch16_gap nasnetalarge@96 nest_tiny@224 nextvit_small nf_regnet_b0 nf_resnet26
    nf_seresnet26 eca_nfnet_l0 dm_nfnet_f0 pit_ti_224@224 pit_ti_distilled_224@224 pnasnet5large@96
    pvt_v2_b0 pvt_v2_b2_li rdnet_tiny regnetx_002 regnety_002 regnetv_040 regnetz_005 repghostnet_050
    repvit_m0_9 repvit_m1 res2net50_14w_8s res2next50 resnest14d resnest50d_4s2x40d resnet10t resnet14t
    resnet18 resnet18d resnet26t resnet50 resnet50_gn resnetaa34d resnetblur18 resnetrs50 resnext50_32x4d
    seresnet18 seresnext26t_32x4d ecaresnet26t ecaresnet50d_pruned ecaresnext26t_32x4d resnetv2_18
    resnetv2_18d resnetv2_50x1_bit resnetv2_50d_gn resnetv2_50d_evos resnetv2_50d_frn rexnet_100 rexnetr_100
    selecsls42b legacy_seresnet18 legacy_seresnext26_32x4d sequencer2d_s@224 shvit_s1 skresnet18
    skresnext50_32x4d starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224@224 swin_s3_tiny_224@224
    swinv2_tiny_window8_256@256 swinv2_cr_tiny_224@224 swinv2_cr_tiny_ns_224@224 tiny_vit_5m_224@224
    tnt_s_legacy_patch16_224@224 tnt_s_patch16_224@224 tresnet_m twins_pcpvt_small@224 twins_svt_small@224
    vgg11_bn visformer_tiny@224 flexivit_small test_vit test_vit2 test_vit3 vit_tiny_patch16_224
    vit_small_patch16_18x2_224 vit_base_patch16_rpn_224 vit_base_patch16_siglip_gap_224
    vit_dlittle_patch16_reg1_gap_256 vit_wee_patch16_reg1_gap_256 vit_pwee_patch16_reg1_gap_256
    vit_small_patch14_reg4_dinov2@56 vit_base_patch32_clip_224 vit_tiny_r_s16_p8_224 vit_small_resnet26d_224
    vit_relpos_small_patch16_224 vit_srelpos_small_patch16_224 samvit_base_patch16_224@224
    vitamin_small_224@224 volo_d1_224@224 eca_vovnet39b ese_vovnet19b_slim ese_vovnet19b_slim_dw vovnet39a
    legacy_xception xception41 xception41p xcit_nano_12_p16_224 xcit_nano_12_p8_224
"""


def _build(name: str, size: int) -> Built:
    ready()
    import timm

    given = timm.get_pretrained_cfg(name)
    fixed = given is not None and given.fixed_input_size and given.input_size[-1] != size
    module = timm.create_model(name, pretrained=False, **({"img_size": size} if fixed else {}))
    return Built(module, (image(size),))


def entries() -> list[Entry]:
    """Every name."""
    found = []
    for word in NAMES.split():
        name, _, size = word.partition("@")
        found.append(Entry("timm", name, partial(_build, name, int(size or 64))))
    return found
