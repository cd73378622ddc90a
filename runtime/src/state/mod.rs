//! Where cluster state is kept: an embedded file store or etcd.
