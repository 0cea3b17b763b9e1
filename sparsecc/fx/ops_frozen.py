"""ATen operators that are left whole on purpose, and why; and those that compute no tensors."""

from __future__ import annotations

from sparsecc.fx.spec import words

_REASONS: dict[str, str] = {
    "puts positions into data, as many as its input decides": """
        nonzero nonzero_numpy nonzero_static argwhere masked_select _unique _unique2 unique_dim
        unique_consecutive unique_dim_consecutive bincount
    """,
    "reads its input in the order of its entries": """
        masked_scatter take put cartesian_prod combinations histogram histogramdd
        searchsorted trapezoid trapz cumulative_trapezoid gradient diagonal_scatter trace vander
        segment_reduce _pack_padded_sequence _pad_packed_sequence pad_sequence quantile nanquantile
    """,
    "addresses memory by strides": """
        as_strided as_strided_copy as_strided_scatter empty_strided new_empty_strided empty_permuted set
        set_data resize resize_as
    """,
    "draws random numbers": """
        bernoulli binomial cauchy exponential geometric log_normal multinomial normal normal_functional
        poisson random randint_like uniform rrelu_with_noise _standard_gamma _sample_dirichlet
        fractional_max_pool2d fractional_max_pool3d
    """,
    "works on whole matrices, of which every entry depends on every other": """
        cholesky cholesky_inverse cholesky_solve det logdet slogdet inverse matrix_exp matrix_power pinverse
        qr svd geqrf orgqr ormqr lu_solve lu_unpack triangular_solve linalg_cholesky linalg_cholesky_ex
        linalg_cond linalg_det linalg_eig linalg_eigh linalg_eigvals linalg_eigvalsh
        linalg_householder_product linalg_inv linalg_inv_ex linalg_ldl_factor linalg_ldl_factor_ex
        linalg_ldl_solve linalg_lstsq linalg_lu linalg_lu_factor linalg_lu_factor_ex linalg_lu_solve
        linalg_matrix_exp linalg_matrix_power linalg_matrix_rank linalg_pinv linalg_qr
        linalg_slogdet linalg_solve linalg_solve_ex linalg_solve_triangular linalg_svd linalg_svdvals
        linalg_tensorinv linalg_tensorsolve linalg_vander nuclear_norm _linalg_det _linalg_eigh
        _linalg_slogdet _linalg_solve_ex _linalg_svd corrcoef cov renorm norm_except_dim
    """,
    "compares classes with targets": """
        cross_entropy_loss nll_loss nll_loss2d nll_loss_nd nll_loss_forward nll_loss2d_forward ctc_loss
        _ctc_loss multi_margin_loss multilabel_margin_loss multilabel_margin_loss_forward
        cosine_embedding_loss hinge_embedding_loss margin_ranking_loss triplet_margin_loss poisson_nll_loss
    """,
    "is a gradient, which a model in evaluation mode does not compute": """
        _adaptive_avg_pool2d_backward avg_pool2d_backward convolution_backward embedding_dense_backward
        max_pool2d_with_indices_backward native_group_norm_backward native_layer_norm_backward
    """,
    "holds quantised numbers, which have no exact form in float64": """
        quantize_per_tensor quantize_per_tensor_dynamic quantize_per_channel dequantize int_repr
        _make_per_tensor_quantized_tensor _make_per_channel_quantized_tensor _int_mm
        fused_moving_avg_obs_fake_quant _fused_moving_avg_obs_fq_helper _weight_int8pack_mm
        _weight_int4pack_mm_for_cpu fbgemm_linear_int8_weight
        _fake_quantize_learnable_per_tensor_affine _fake_quantize_learnable_per_channel_affine
    """,
    "fuses a whole layer, with widths that are no axes of its operands": """
        _native_multi_head_attention _transformer_encoder_layer_fwd _transform_bias_rescale_qkv
        _triton_multi_head_attention _masked_softmax _thnn_fused_lstm_cell _thnn_fused_gru_cell
        _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention
        _scaled_dot_product_cudnn_attention _scaled_dot_product_fused_attention_overrideable
        quantized_lstm quantized_gru _trilinear _addmm_activation
    """,
    "changes its own table while it looks up": "embedding_renorm",
    "sums over batches or broadcasts by other rules than its relatives": "addr addbmm conv_tbc sum_to_size",
}

#: operator -> why no axis that it touches may lose positions
FROZEN: dict[str, str] = {name: why for why, names in _REASONS.items() for name in words(names)}

#: operators that give numbers or nothing: readers of sizes, checks
SCALARS = frozenset(
    words(
        """
        sym_numel sym_size sym_storage_offset sym_stride sym_is_contiguous _local_scalar_dense item
        sym_constrain_range sym_constrain_range_for_size _assert_async _assert_scalar _print
        _functional_assert_async _functional_assert_scalar
        """
    )
)
