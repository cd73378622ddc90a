//! Initial layouts in SGLang's form: `{"physical_to_logical_map": [[0, 1, ...], ...]}`, one row for each layer.

use serde::Deserialize;

use super::map::{ExpertMap, Layout, MapError, MapShape};

#[derive(Deserialize)]
struct File {
    physical_to_logical_map: Option<Vec<Vec<i64>>>,
}

/// Which rows of such a file are MoE layers.
#[derive(Clone, Copy, Debug)]
pub struct ModelLayers<'a> {
    /// All layers of the model, the dense ones included.
    pub num_hidden_layers: usize,
    /// Indices of the MoE layers among them.
    pub moe_layers: &'a [usize],
}

impl Layout {
    /// Reads a layout for `shape`. Rows are those of all layers, as SGLang writes them (those of dense layers are
    /// ignored), or of the MoE layers only. Fails, with the layer, slot and expert, when anything does not fit.
    pub fn from_sglang_json(json: &str, shape: MapShape, layers: ModelLayers) -> Result<Self, MapError> {
        let file: File = serde_json::from_str(json).map_err(|error| MapError::Json(error.to_string()))?;
        let rows = file.physical_to_logical_map.ok_or_else(|| {
            MapError::Json(
                "the key physical_to_logical_map is missing (a recording of loads is not a layout)".into(),
            )
        })?;
        let ModelLayers { num_hidden_layers, moe_layers } = layers;
        let (moe, all) = (moe_layers.len(), num_hidden_layers);
        let rows: Vec<(usize, &Vec<i64>)> = if rows.len() == all {
            moe_layers.iter().map(|&layer| (layer, &rows[layer])).collect()
        } else if rows.len() == moe {
            moe_layers.iter().copied().zip(&rows).collect()
        } else {
            let found = rows.len();
            return Err(MapError::Layers(format!(
                "found {found} rows, expected {all} (all layers) or {moe} (MoE)"
            )));
        };
        let maps = rows.into_iter().map(|(layer, row)| {
            row_to_map(row, shape).map_err(|source| MapError::Row { layer, source: Box::new(source) })
        });
        Self::new(maps.collect::<Result<_, _>>()?)
    }
}

fn row_to_map(row: &[i64], shape: MapShape) -> Result<ExpertMap, MapError> {
    let experts = row.iter().enumerate().map(|(slot, &expert)| {
        let last = shape.experts.saturating_sub(1);
        u32::try_from(expert).map_err(|_| MapError::NoSuchExpert { slot, expert, last })
    });
    ExpertMap::new(shape, experts.collect::<Result<_, _>>()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: MapShape = MapShape { experts: 3, slots: 4, ranks: 2 };
    const LAYERS: ModelLayers = ModelLayers { num_hidden_layers: 3, moe_layers: &[1, 2] };

    #[test]
    fn rows_of_all_layers_or_of_moe_layers() {
        let read = |json: &str| Layout::from_sglang_json(json, SHAPE, LAYERS).unwrap();
        let moe = read(r#"{"physical_to_logical_map": [[2,1,0,1],[0,1,2,0]], "metadata": 1}"#);
        let all = read(r#"{"physical_to_logical_map": [[0,0,0,0],[2,1,0,1],[0,1,2,0]]}"#);
        assert_eq!(moe, all);
        assert_eq!(moe.layer(0).physical_to_logical(), [2, 1, 0, 1]);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let why = |json: &str| Layout::from_sglang_json(json, SHAPE, LAYERS).unwrap_err().to_string();
        assert!(why("[]").contains("physical_to_logical_map"));
        assert!(why(r#"{"logical_count": []}"#).contains("is missing"));
        assert!(why(r#"{"physical_to_logical_map": [[0,1,2,0]]}"#).contains("found 1 rows, expected 3"));
        let second = |row: &str| why(&format!(r#"{{"physical_to_logical_map": [[0,1,2,0],{row}]}}"#));
        assert_eq!(second("[0,1,2]"), "layer 2: the map has 3 slots, 4 were expected");
        assert_eq!(second("[0,1,-1,2]"), "layer 2: slot 2 holds expert -1, but the model has experts 0 to 2");
        assert_eq!(second("[0,1,3,2]"), "layer 2: slot 2 holds expert 3, but the model has experts 0 to 2");
        assert_eq!(second("[0,1,1,0]"), "layer 2: expert 2 has no slot");
    }
}
