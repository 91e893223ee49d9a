"""The walks of ``walk.py`` and ``walk_backward.py`` for Hopper, in Gluon: each program is a small pipeline of warp groups."""
