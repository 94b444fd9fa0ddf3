"""Evaluation: does the optimiser help, by how much, and how sure are we.

    queries of the sets × policies ─► prompts ─► verdicts ─► videos ─► scores ─► samples ─► results.json

`vpo evaluate recipe.yaml` is `evaluate.evaluate`: the prompts of every policy (`policies`), judged, rendered
and scored as run directories of their own (`grid`), flattened to one row a policy, query and seed
(`samples`), whose figures (`figures`) come with intervals and tests (`statistics`).
"""
