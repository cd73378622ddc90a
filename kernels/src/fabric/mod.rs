//! Links between the ranks of a group: shared memory on one host, TCP across hosts.
