"""Other libraries' gestures on bncurv's curvature, one module for each library, which it imports; the rest never does.

`bncurv.adapters.curvlinops`: the GGN as a linear operator, for curvlinops' estimators (extra ``curvlinops``).
`bncurv.adapters.laplace`: a curvature back-end of laplace-torch, in the mode that training sees (extra ``laplace``).
"""
