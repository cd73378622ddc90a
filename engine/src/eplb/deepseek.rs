//! DeepSeek's policy: `rebalance_experts`, to the letter.
//!
//! It replicates the experts with the most load per replica and packs the replicas onto GPUs, heaviest first, either
//! globally or within nodes that own whole expert groups. It does not look at the present map, so nearly every slot
//! changes. Arithmetic is f32 and ties go to the lower index, so results equal the published implementation's.

use super::map::{ExpertMap, MapShape};

/// What cannot be balanced.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// Two sizes do not divide.
    #[error("{what} ({value}) must be a multiple of {divisor_name} ({divisor})")]
    Indivisible {
        /// The larger size.
        what: &'static str,
        /// Its value.
        value: usize,
        /// The smaller size.
        divisor_name: &'static str,
        /// Its value.
        divisor: usize,
    },
    /// Fewer slots than experts.
    #[error("{slots} slots cannot hold {experts} experts")]
    TooFewSlots {
        /// Physical slots.
        slots: usize,
        /// Logical experts.
        experts: usize,
    },
    /// The loads are not one finite, non-negative number for each expert.
    #[error("the loads must be one finite number of at least 0 for each expert of each layer")]
    Loads,
}

/// The sizes that `rebalance_experts` needs besides the loads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// Physical slots of a layer, over all GPUs.
    pub num_replicas: usize,
    /// Expert groups of the model.
    pub num_groups: usize,
    /// Nodes with a fast network inside.
    pub num_nodes: usize,
    /// GPUs over all nodes.
    pub num_gpus: usize,
}

/// The result for one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rebalanced {
    /// The expert of each slot.
    pub physical_to_logical: Vec<u32>,
    /// The slots of each expert, in the order in which its replicas were made.
    pub logical_to_physical: Vec<Vec<u32>>,
    /// Replicas of each expert.
    pub replica_counts: Vec<u32>,
}

/// Balances each layer's loads, `[layers][experts]`.
pub fn rebalance_experts(weight: &[Vec<f32>], cluster: Cluster) -> Result<Vec<Rebalanced>, PolicyError> {
    let experts = weight.first().map_or(0, Vec::len);
    let valid = |load: &f32| load.is_finite() && *load >= 0.0;
    if experts == 0 || weight.iter().any(|layer| layer.len() != experts || !layer.iter().all(valid)) {
        return Err(PolicyError::Loads);
    }
    let cluster = check(cluster, experts)?;
    Ok(weight.iter().map(|layer| hierarchical(layer, cluster)).collect())
}

/// One layer's new map for a cluster whose GPUs are the ranks of `shape`.
pub fn rebalance_map(
    loads: &[f32],
    shape: MapShape,
    num_groups: usize,
    num_nodes: usize,
) -> Result<ExpertMap, PolicyError> {
    let num_gpus = shape.ranks as usize;
    let cluster = Cluster { num_replicas: shape.slots as usize, num_groups, num_nodes, num_gpus };
    if loads.len() != shape.experts as usize {
        return Err(PolicyError::Loads);
    }
    let mut layers = rebalance_experts(&[loads.to_vec()], cluster)?;
    let map = layers.pop().expect("one layer in, one out").physical_to_logical;
    Ok(ExpertMap::new(shape, map).expect("the policy gives every expert a slot"))
}

/// Falls back to one group on one node where groups cannot be kept whole, and checks what must divide.
fn check(cluster: Cluster, experts: usize) -> Result<Cluster, PolicyError> {
    let Cluster { num_replicas, num_groups, num_nodes, num_gpus } = cluster;
    let divides = |what, value: usize, divisor_name, divisor: usize| {
        if divisor > 0 && value > 0 && value.is_multiple_of(divisor) {
            Ok(())
        } else {
            Err(PolicyError::Indivisible { what, value, divisor_name, divisor })
        }
    };
    if num_replicas < experts {
        return Err(PolicyError::TooFewSlots { slots: num_replicas, experts });
    }
    divides("num_replicas", num_replicas, "num_gpus", num_gpus)?;
    if num_nodes == 0 || num_groups == 0 || !num_groups.is_multiple_of(num_nodes) {
        return Ok(Cluster { num_groups: 1, num_nodes: 1, ..cluster });
    }
    divides("num_gpus", num_gpus, "num_nodes", num_nodes)?;
    divides("experts", experts, "num_groups", num_groups)?;
    Ok(cluster)
}

/// Where each item was packed.
struct Packed {
    pack: Vec<usize>,
    /// Place within the pack.
    rank: Vec<usize>,
}

/// Packs `n` items into `packs` packs of equal size, heaviest first, each into the lightest pack with room.
fn balanced_packing(weight: &[f32], packs: usize) -> Packed {
    let capacity = weight.len() / packs;
    if capacity == 1 {
        return Packed { pack: (0..packs).collect(), rank: vec![0; packs] };
    }
    let mut packed = Packed { pack: vec![0; weight.len()], rank: vec![0; weight.len()] };
    let (mut items, mut sums) = (vec![0; packs], vec![0.0f32; packs]);
    for item in heaviest_first(weight) {
        let mut lightest: Option<usize> = None;
        for pack in (0..packs).filter(|&pack| items[pack] < capacity) {
            if lightest.is_none_or(|best| sums[pack] < sums[best]) {
                lightest = Some(pack);
            }
        }
        let pack = lightest.expect("the packs hold all items");
        packed.pack[item] = pack;
        packed.rank[item] = items[pack];
        items[pack] += 1;
        sums[pack] += weight[item];
    }
    packed
}

fn heaviest_first(weight: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..weight.len()).collect();
    order.sort_by(|&a, &b| weight[b].total_cmp(&weight[a]));
    order
}

/// Replicas of experts, in the order in which they were made.
struct Replicated {
    logical: Vec<usize>,
    /// Which copy of its expert each is.
    rank: Vec<usize>,
    count: Vec<u32>,
}

/// One replica of each expert, then more of whichever has most load per replica.
fn replicate(weight: &[f32], replicas: usize) -> Replicated {
    let n = weight.len();
    let mut result = Replicated { logical: (0..n).collect(), rank: vec![0; n], count: vec![1; n] };
    for _ in n..replicas {
        let share = |e: usize| weight[e] / result.count[e] as f32;
        let mut hottest = 0;
        for e in 1..n {
            if share(e) > share(hottest) {
                hottest = e;
            }
        }
        result.logical.push(hottest);
        result.rank.push(result.count[hottest] as usize);
        result.count[hottest] += 1;
    }
    result
}

/// Packs groups onto nodes, replicates experts within each node, packs replicas onto the node's GPUs.
fn hierarchical(weight: &[f32], cluster: Cluster) -> Rebalanced {
    let Cluster { num_replicas, num_groups, num_nodes, num_gpus } = cluster;
    let experts = weight.len();
    let group_size = experts / num_groups;
    let groups_per_node = num_groups / num_nodes;
    let (experts_per_node, slots_per_node) = (experts / num_nodes, num_replicas / num_nodes);
    let slots_per_gpu = num_replicas / num_gpus;

    let group_loads: Vec<f32> = weight.chunks(group_size).map(|group| group.iter().sum()).collect();
    let nodes = balanced_packing(&group_loads, num_nodes);
    // Experts in the order of their nodes.
    let mut by_node = vec![0; experts];
    for group in 0..num_groups {
        let place = (nodes.pack[group] * groups_per_node + nodes.rank[group]) * group_size;
        for j in 0..group_size {
            by_node[place + j] = group * group_size + j;
        }
    }

    let mut physical_to_logical = vec![0u32; num_replicas];
    let mut replica_counts = vec![0u32; experts];
    let mut replica_ranks = vec![0; num_replicas];
    for (node, members) in by_node.chunks(experts_per_node).enumerate() {
        let loads: Vec<f32> = members.iter().map(|&expert| weight[expert]).collect();
        let replicas = replicate(&loads, slots_per_node);
        let shares: Vec<f32> =
            replicas.logical.iter().map(|&expert| loads[expert] / replicas.count[expert] as f32).collect();
        let gpus = balanced_packing(&shares, num_gpus / num_nodes);
        for (replica, &expert) in replicas.logical.iter().enumerate() {
            let slot = node * slots_per_node + gpus.pack[replica] * slots_per_gpu + gpus.rank[replica];
            physical_to_logical[slot] = members[expert] as u32;
            replica_ranks[slot] = replicas.rank[replica];
        }
        for (expert, &count) in members.iter().zip(&replicas.count) {
            replica_counts[*expert] = count;
        }
    }
    let mut logical_to_physical: Vec<Vec<u32>> =
        replica_counts.iter().map(|&count| vec![0; count as usize]).collect();
    for (slot, &expert) in (0u32..).zip(&physical_to_logical) {
        logical_to_physical[expert as usize][replica_ranks[slot as usize]] = slot;
    }
    Rebalanced { physical_to_logical, logical_to_physical, replica_counts }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_the_published_example() {
        let weight = [
            vec![90., 132., 40., 61., 104., 165., 39., 4., 73., 56., 183., 86.],
            vec![20., 107., 104., 64., 19., 197., 187., 157., 172., 86., 16., 27.],
        ];
        let cluster = Cluster { num_replicas: 16, num_groups: 4, num_nodes: 2, num_gpus: 8 };
        let layers = rebalance_experts(&weight, cluster).unwrap();
        assert_eq!(layers[0].physical_to_logical, [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]);
        assert_eq!(layers[1].physical_to_logical, [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]);
        assert_eq!(layers[0].replica_counts, [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]);
        assert_eq!(layers[0].logical_to_physical[5], [0, 2]);
    }

    #[test]
    fn global_example() {
        let weight = vec![600., 560., 120., 120., 20., 10., 10., 10.];
        let cluster = Cluster { num_replicas: 16, num_groups: 1, num_nodes: 1, num_gpus: 8 };
        let layer = &rebalance_experts(std::slice::from_ref(&weight), cluster).unwrap()[0];
        let share = |&e: &u32| weight[e as usize] / layer.replica_counts[e as usize] as f32;
        let gpus: Vec<f32> =
            layer.physical_to_logical.chunks(2).map(|gpu| gpu.iter().map(share).sum()).collect();
        assert_eq!(gpus.iter().copied().fold(0.0, f32::max), 232.0);
        assert_eq!(gpus.iter().sum::<f32>() / 8.0, 181.25);
    }

    #[test]
    fn groups_that_do_not_divide_among_nodes_are_balanced_globally() {
        let weight = [(0..12).map(|i| (i * 37 % 23) as f32).collect::<Vec<_>>()];
        let odd = Cluster { num_replicas: 16, num_groups: 3, num_nodes: 2, num_gpus: 8 };
        let global = Cluster { num_groups: 1, num_nodes: 1, ..odd };
        assert_eq!(rebalance_experts(&weight, odd), rebalance_experts(&weight, global));
    }

    #[test]
    fn what_cannot_be_balanced_is_named() {
        let weight = [vec![1.0; 12]];
        let good = Cluster { num_replicas: 16, num_groups: 4, num_nodes: 2, num_gpus: 8 };
        let why = |cluster| rebalance_experts(&weight, cluster).unwrap_err().to_string();
        assert!(why(Cluster { num_replicas: 8, ..good }).contains("cannot hold"));
        assert!(why(Cluster { num_gpus: 5, ..good }).contains("num_gpus (5)"));
        assert!(why(Cluster { num_groups: 8, ..good }).contains("num_groups (8)"));
        assert_eq!(rebalance_experts(&[vec![f32::NAN; 12]], good), Err(PolicyError::Loads));
        assert_eq!(rebalance_experts(&[], good), Err(PolicyError::Loads));
    }
}
