"""Recipes that luthier writes: for a user's rows (`init`), and from other trainers' configs."""
