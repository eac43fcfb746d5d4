"""Feature matching, with fixed weights and with learned ones."""

from l2t_fast.methods.base import Method

# w = 1/C_s, λ = 1.
_FM = "Romero et al., FitNets, ICLR 2015"
FM_SINGLE = Method(_FM, pairs="single")
FM_ONE_TO_ONE = Method(_FM, pairs="one-to-one")

# Learned channels (w); learned channels and pairs (ww).
_L2T = "Jang et al., Learning What and Where to Transfer, ICML 2019"
L2T_W_SINGLE = Method(_L2T, pairs="single", what="softmax")
L2T_W_ONE_TO_ONE = Method(_L2T, pairs="one-to-one", what="softmax")
L2T_WW = Method(_L2T, pairs="all-to-all", what="softmax", where="relu6")
