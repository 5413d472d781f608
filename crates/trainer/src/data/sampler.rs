//! Which examples each step takes.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// The examples of every step, a pure function of the step: so that a resumed run takes up where it was.
#[derive(Clone, Debug)]
pub struct Sampler {
    num_examples: usize,
    batch_size: usize,
    shuffle_seed: Option<u64>,
    wraps: bool,
    epoch: Option<(usize, Vec<usize>)>,
}

impl Sampler {
    /// Consecutive examples, in file order, or in a new order at each pass if there is a seed. Unless it `wraps`,
    /// the last batch of a pass is shorter where the examples run out.
    pub fn new(num_examples: usize, batch_size: usize, shuffle_seed: Option<u64>, wraps: bool) -> Self {
        Self {
            num_examples,
            batch_size,
            shuffle_seed,
            wraps,
            epoch: None,
        }
    }

    /// Steps of one pass over the examples.
    pub fn steps_per_epoch(&self) -> u64 {
        self.num_examples.div_ceil(self.batch_size) as u64
    }

    /// The examples of `step`, from 0.
    pub fn indices(&mut self, step: u64) -> Vec<usize> {
        let first = usize::try_from(step)
            .unwrap_or(usize::MAX)
            .saturating_mul(self.batch_size);
        let last = first.saturating_add(self.batch_size);
        let last = if self.wraps {
            last
        } else {
            last.min(self.num_examples)
        };
        (first..last).map(|at| self.at(at)).collect()
    }

    fn at(&mut self, position: usize) -> usize {
        let (epoch, place) = (position / self.num_examples, position % self.num_examples);
        let Some(seed) = self.shuffle_seed else {
            return place;
        };
        match &self.epoch {
            Some((at, order)) if *at == epoch => order[place],
            _ => {
                let mut order: Vec<usize> = (0..self.num_examples).collect();
                order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed.wrapping_add(epoch as u64)));
                let index = order[place];
                self.epoch = Some((epoch, order));
                index
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_continue_and_wrap() {
        let mut sampler = Sampler::new(5, 2, None, true);
        assert_eq!(
            [0, 1, 2, 3].map(|step| sampler.indices(step)),
            [[0, 1], [2, 3], [4, 0], [1, 2]]
        );
        let mut once = Sampler::new(5, 2, None, false);
        assert_eq!((once.steps_per_epoch(), once.indices(2)), (3, vec![4]));
    }

    #[test]
    fn every_pass_takes_each_example_once_in_another_order() {
        let mut sampler = Sampler::new(64, 8, Some(7), true);
        let mut pass = |from: u64| {
            (from..from + 8)
                .flat_map(|step| sampler.indices(step))
                .collect::<Vec<_>>()
        };
        let (first, second) = (pass(0), pass(8));
        assert_ne!(first, second);
        assert_eq!(first, pass(0));
        for mut order in [first, second] {
            order.sort_unstable();
            assert_eq!(order, (0..64).collect::<Vec<_>>());
        }
    }
}
