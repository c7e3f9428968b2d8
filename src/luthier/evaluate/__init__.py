"""A model measured on rows: how likely the replies are to it, what it answers, and how sure that
is.
"""
