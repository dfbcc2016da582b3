import numpy as np


class Affine:
    def __init__(self, W, b):
        self.W, self.b = W, b

    def forward(self, x):
        self.x = x
        return x.reshape(len(x), -1) @ self.W + self.b

    def backward(self, dy):
        x = self.x.reshape(len(self.x), -1)
        self.dW, self.db = x.T @ dy, self.sum_rows(dy)
        return (dy @ self.W.T).reshape(self.x.shape)

    def sum_rows(self, dy):
        return dy.sum(axis=0)


class MeanBias(Affine):
    """Wrong: averages over the batch."""

    def sum_rows(self, dy):
        return dy.mean(axis=0)


class RunningSum(Affine):
    """Wrong in half precision: adds up in the dtype of dy."""

    def sum_rows(self, dy):
        db = np.zeros_like(self.b)
        for row in dy:
            db += row
        return db
