"""`TransformersEngine(policy)` is `fastppo.rollout.PackedEngine(policy.actor)` now."""

raise ImportError(
    "fastppo.rollout.transformers has moved: import PackedEngine from fastppo.rollout, and "
    "write PackedEngine(policy.actor) for TransformersEngine(policy)"
)
