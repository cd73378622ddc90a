//! Meshes, as far as the head knows them: a group whose ranks have a shape. Removed as one.

use super::actors::Then;
use super::{Command, HeadState};
use crate::mesh::MeshNow;

impl HeadState {
    /// The mesh of that name.
    pub fn mesh(&self, name: &str) -> Result<MeshNow, String> {
        let group = self.groups.get(name).ok_or_else(|| format!("there is no mesh named {name:?}"))?;
        let dims = group.members().values().find_map(|actor| self.actors.get(actor)?.spec.mesh.clone());
        let dims = dims.ok_or_else(|| format!("group {name:?} is not a mesh, its ranks have no shape"))?;
        Ok(MeshNow { dims, view: group.view().clone() })
    }

    /// Ends all ranks of a mesh and forgets them.
    pub fn remove_mesh(&mut self, now: std::time::Duration, name: &str) -> Result<Vec<Command>, String> {
        self.now = now;
        self.mesh(name)?;
        let ranks: Vec<String> = self.groups[name].members().values().cloned().collect();
        for rank in ranks {
            self.retire(&rank, "its mesh was removed", Then::Forget);
        }
        Ok(self.finish())
    }
}
