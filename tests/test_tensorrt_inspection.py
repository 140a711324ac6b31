"""What the engine inspector tells, from its JSON; no GPU is needed to read it."""

from __future__ import annotations

from typing import Any

import pytest

from graphopt.backends.tensorrt.inspection import check_kernels, kernels_of, parsed
from graphopt.errors import BackendError


def layer(name: str, kind: str = "", tactic: str = "", reads: str = "") -> dict[str, Any]:
    inputs = [{"Name": "x", "Dimensions": [1, 40, 256], "Format/Datatype": reads}] if reads else []
    return {"Name": name, "LayerType": kind, "TacticName": tactic, "Inputs": inputs, "Outputs": []}


HALF = "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize32x32x64_stage6_warpsize2x2x1_tensor16x8x16"
INT8 = "sm80_xmma_gemm_i8f16_i8i32_f32_tn_n_tilesize128x128x64_stage3_warpsize2x2x1_tensor16x8x32"
LAYERS = [
    layer("/encoder/MatMul_myl0_7", "gemm", HALF, "Half"),
    layer("/encoder/MatMul_myl0_8", "gemm", INT8, "Int8"),
    layer("__myl_AddCastMeanSubMulMean_myl0_8", "kgen", "__myl_AddCastMeanSubMulMean_0xf2543c36", "Half"),
    layer("_gemm_mha_v2_myl0_9", "kgen", "_gemm_mha_v2_0xd1e8", "Half"),
    layer("/encoder/MatMul [profile 1]_myl2_7", "gemm", HALF, "Half"),
    layer("_gemm_mha_v2_myl2_8", "kgen", "_gemm_mha_v2_0xd1e8", "Half"),  # of the same part, so of that profile
    layer("__myl_Fc_myl2_9", "fusion", HALF, "Half"),
    layer("fc", "CaskGemmMatrixMultiply", "sm80_xmma_sparse_gemm_f16f16_f16", "Row major linear FP16 format"),
    layer("plain", "MatrixMultiply", "", "Row major linear FP32"),
]


def test_layers_are_counted_in_the_first_profile() -> None:
    assert kernels_of(parsed(LAYERS)) == {
        "products in fp16": 2, "products in int8": 1, "fused attentions": 1, "sparse products": 1, "products in fp32": 1,
    }  # fmt: skip


def test_parts_that_make_the_same_again_are_of_later_profiles() -> None:
    """Where no name says so, as in engines of 10.6 that are summed in fp32."""

    def made(name: str, *onnx: str) -> dict[str, Any]:
        return {**layer(name, "gemm", HALF), "Metadata": "\x1f".join(f"[ONNX Layer: {each}]" for each in onnx)}

    first = [made("a_myl0_1", "MatMul_1", "Add_1"), made("b_myl0_2", "MatMul_2")]
    other_part = [made("c_myl1_1", "MatMul_3")]
    second = [made("d_myl2_1", "MatMul_2", "Add_1"), made("e_myl2_2", "MatMul_1"), made("f_myl3_1", "MatMul_3")]
    names = [each.name for each in parsed([*first, *other_part, *second, layer("copy", "NoOp")])]
    assert names == ["a_myl0_1", "b_myl0_2", "c_myl1_1", "copy"]


def test_names_alone_tell_of_attention_only() -> None:
    assert kernels_of(parsed(["_gemm_mha_v2_myl0_9", "fc [profile 1]", "anything"])) == {"fused attentions": 1}


@pytest.mark.parametrize(
    ("tactic", "reads", "precision"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "BFloat16", "bf16"),
        ("sm90_xmma_gemm_e4m3e4m3_f32", "FP8", "fp8"),
        ("sm80_xmma_gemm_f32f32_tf32f32", "Float", "fp32"),
        ("ampere_sgemm_128x64", "", "fp32"),
        ("cutlass_gemm_of_its_own", "Half", "fp16"),
        ("cutlass_gemm_of_its_own", "Float", "fp32"),
        ("cutlass_gemm_of_its_own", "", None),
    ],
)
def test_a_products_precision(tactic: str, reads: str, precision: str | None) -> None:
    (found,) = parsed([layer("x", "gemm", tactic, reads)])
    assert found.precision == precision


@pytest.mark.parametrize("precision", ["int8", "fp16", "bf16"])
def test_a_precision_that_did_not_happen_is_refused(precision: str) -> None:
    with pytest.raises(BackendError, match=f"12 products were to be in {precision}, and the engine has none"):
        check_kernels({"products in fp32": 12}, {precision: 12}, sparse=False)


def test_what_happened_passes() -> None:
    kernels = {"products in int8": 11, "products in fp16": 1, "fused attentions": 2}
    assert check_kernels(kernels, {"int8": 12, "fp16": 0, "bf16": 0}, sparse=False) == []
    assert check_kernels({"fused attentions": 2}, {"int8": 12}, sparse=False) == []  # nothing is known of products


def test_sparse_kernels_that_were_not_taken_are_told() -> None:
    assert check_kernels({"products in fp16": 2, "sparse products": 1}, {}, sparse=True) == []
    (note,) = check_kernels({"products in fp16": 2}, {}, sparse=True)
    assert "no sparse kernel was faster" in note
