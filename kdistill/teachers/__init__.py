"""A teacher as a function, images -> logits: frozen, adapted, blended, and its outputs stored and replayed.

How the student learns from these outputs is in `distillation`.
"""
