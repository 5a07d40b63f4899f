"""`TransformersEngine` is `fastppo.rollout.packed.PackedEngine` now."""

raise ImportError(
    "fastppo.rollout.transformers has moved: write "
    "`from fastppo.rollout.packed import PackedEngine` for TransformersEngine"
)
