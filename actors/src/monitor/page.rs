//! The page: three files that were built from `actors/page` and are part of this binary, so it works offline and always
//! fits the server. They hold no data, so they are served before a key is shown.

use actix_web::HttpResponse;
use actix_web::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use actix_web::web::{self, ServiceConfig};

/// Path, content type, content.
const FILES: [(&str, &str, &[u8]); 4] = [
    ("/", "text/html; charset=utf-8", include_bytes!("../../page/dist/index.html")),
    ("/page/app.js", "text/javascript; charset=utf-8", include_bytes!("../../page/dist/page/app.js")),
    ("/page/app.css", "text/css; charset=utf-8", include_bytes!("../../page/dist/page/app.css")),
    ("/favicon.svg", "image/svg+xml", include_bytes!("../../page/dist/favicon.svg")),
];
/// Nothing from elsewhere runs in the page, and no other page may frame it.
const POLICY: &str = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";

/// Whether a path is one of the page's files.
pub(crate) fn is_file(path: &str) -> bool {
    FILES.iter().any(|(at, ..)| *at == path)
}

pub(super) fn routes(app: &mut ServiceConfig) {
    for (path, kind, content) in FILES {
        let serve = move || async move {
            HttpResponse::Ok()
                .content_type(kind)
                .insert_header((CACHE_CONTROL, "no-cache"))
                .insert_header((CONTENT_SECURITY_POLICY, POLICY))
                .insert_header((X_FRAME_OPTIONS, "DENY"))
                .insert_header((X_CONTENT_TYPE_OPTIONS, "nosniff"))
                .body(content)
        };
        app.route(path, web::get().to(serve));
    }
}
