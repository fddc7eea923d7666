"""A file that loses too much, repaired: other ranges, equal channels, layers in float, training with the teacher.

What one conversion does belongs into `conversion`; here is what is tried after it was refused, in which order, and when
to stop. Read `repair` first.
"""
