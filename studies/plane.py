"""The plane through three networks, and the picture of errors on it."""

from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from matplotlib.colors import BoundaryNorm

from lab.errors import UserError
from studies.show import new_figure, save_both

LABEL = {'boxstyle': 'round,pad=0.1', 'facecolor': 'white', 'alpha': 0.7, 'edgecolor': 'none'}
MARGIN = 0.4  # around the networks, as a share of the larger of their two extents


@dataclass
class Plane:
    """The plane through three vectors of weights: origin + alpha u + beta v, with u, v orthonormal.

    Raises UserError if the three are on a line.
    """

    vectors: list

    def __post_init__(self):
        self.origin, second, third = [vector.double() for vector in self.vectors]
        self.u = second - self.origin
        self.u = self.u / self.u.norm()
        self.v = third - self.origin
        length = self.v.norm()
        self.v = self.v - self.v.dot(self.u) * self.u
        if not self.v.norm() > 1e-6 * length:
            raise UserError('the three networks are on a line, which is no plane: choose others')
        self.v = self.v / self.v.norm()

    def coordinates(self, vector):
        """(alpha, beta) of a vector's projection."""
        offset = vector.double() - self.origin
        return [offset.dot(self.u).item(), offset.dot(self.v).item()]

    def point(self, alpha, beta):
        return self.origin + alpha * self.u + beta * self.v

    def axes(self, n):
        """n values of alpha and n of beta, around the three vectors."""
        corners = np.array([self.coordinates(vector) for vector in self.vectors])
        low, high = corners.min(0), corners.max(0)
        margin = MARGIN * (high - low).max()
        return np.linspace(low - margin, high + margin, n).T


def draw_plane(points, marks, stem, path=()):
    """Draw contours of the error on training and test images, and where the networks are.

    On test images, a star marks the point with the smallest error, which is in the title.

    Args:
        points: records with 'alpha', 'beta', 'train_acc' and 'val_acc', on a grid.
        marks: {name: (alpha, beta)} of networks.
        path: (alpha, beta) of the networks that a training went through.
    """
    alphas, betas = [sorted({point[axis] for point in points}) for axis in ('alpha', 'beta')]
    best = max(points, key=itemgetter('val_acc'))
    style = {'color': 'white', 'markeredgecolor': 'black', 'clip_on': False}
    figure = new_figure(9, 1.7 + 3.8 * np.ptp(betas) / np.ptp(alphas))
    for axes, key in zip(figure.subplots(1, 2), ('train_acc', 'val_acc')):
        errors = np.empty((len(betas), len(alphas)))
        for point in points:
            row, column = betas.index(point['beta']), alphas.index(point['alpha'])
            errors[row, column] = 100 * (1 - point[key])
        # Levels are dense near the lowest error, where the networks are, and each has its colour.
        levels = errors.min() + np.array([0, *np.geomspace(0.1, max(1, np.ptp(errors)), 12)])
        norm = BoundaryNorm(levels, 256)
        contours = axes.contourf(alphas, betas, errors, levels, cmap='viridis_r', norm=norm)
        figure.colorbar(contours, location='bottom', format='%.1f', label='error (%)')
        for place in path:
            axes.plot(*place, '.', color='black')
        for name, place in marks.items():
            axes.plot(*place, 'o', **style)
            right = place[0] >= best['alpha']  # away from the star
            aside = {'xytext': (5 if right else -5, 5), 'ha': 'left' if right else 'right'}
            axes.annotate(name, place, textcoords='offset points', bbox=LABEL, **aside)
        axes.set(xlabel='distance along u', ylabel='distance along v', aspect='equal')
        axes.set_title('training images')
        if key == 'val_acc':
            axes.plot(best['alpha'], best['beta'], '*', markersize=12, **style)
            axes.set_title(f'test images (star: the best, {100 * (1 - best["val_acc"]):.1f}%)')
    save_both(figure, stem)
