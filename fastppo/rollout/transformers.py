"""`TransformersEngine(policy)` is `fastppo.rollout.packed.PackedEngine(policy.actor)` now."""

raise ImportError(
    "fastppo.rollout.transformers has moved: import PackedEngine from fastppo.rollout.packed, and "
    "write PackedEngine(policy.actor) for TransformersEngine(policy)"
)
